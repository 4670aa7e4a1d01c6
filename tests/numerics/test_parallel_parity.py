"""Every grid of ranks against one process: loss, norm and every gradient, before and after two steps; the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from parallel.axes import query_plan
from parallel.axes.halo_plan import equal_edges
from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.model.layers import loss
from pipeline.planning import tile_size
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from pipeline.planning.context_shards import halo_plan
from pipeline.training import optimizer
from pipeline.training.gradients import FlatGradients
from pipeline.training.run_record import Run
from pipeline.training.state import whole_state
from tests.numerics.movement import tensor_errors
from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny, write_tokenizer
from tools.support.parity import Observed, compare, observe

STEPS = 2
MOVED = 1e-4
"""Error of an update over its size."""
YAML = """
model: {{path: {base}, context: 64, dtype: fp32, base: {kept}, rope: {{type: linear, factor: 2}}}}
attention: {attention}
lora: {{rank: 4, targets: [{targets}]}}
data: {{path: {text}, sequence: {sequence}, mask_documents: {packed}, cache: {cache}}}
train: {{steps: 6, global_batch: {batch}, micro_batch: {micro}, lr: 1.0e-3, eps: 1.0e-4, warmup_steps: 2,
  recompute: {recompute}, trainable: [{trainable}]}}
parallel: {{tp: {tp}, cp: {cp}, pp: {pp}, virtual: {virtual}{engine}}}
output: {output}
"""
S2 = "{kind: s2, group_size: 16}"


@dataclass(frozen=True)
class Model:
    """A tiny base model, its text form and its attention: what one process computes once for all grids."""

    kind: str
    over: dict[str, Any] = field(default_factory=dict)
    attention: str = S2
    sequence: int = 64
    packed: bool = False
    micro: int = 1
    batch: int = 4
    """Sequences a step: two micro-batches or more on every grid, as many as pipeline stages."""
    recompute: str = "none"
    trainable: str = ""
    """train.trainable; empty: all that can train."""
    targets: str = "q, k, v, o, gate, up, down"
    """lora.targets; a checkpointed MLP without any is computed in tiles."""

    kept: str = "bf16"
    """model.base."""

    @property
    def tied(self) -> bool:
        """The output matrix is the embedding."""
        return bool(self.over.get("tie_word_embeddings")) or self.kind == "smollm2"


MODELS = {
    # Untied, 4 query and 4 KV heads, uneven layers; the sequence pads to whole shards.
    "untied": Model("llama2", {"num_hidden_layers": 5, "vocab_size": 131}, sequence=61),
    # Micro-batches enough for four stages to alternate between forward and backward, and for four replicas.
    "untied eight": Model("llama2", {"num_hidden_layers": 5, "vocab_size": 131}, sequence=61, batch=8),
    # Tied, GQA 8 / 4, packed documents; two sequences a micro-batch.
    "tied": Model(
        "tinyllama",
        {"num_hidden_layers": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 131},
        packed=True,
        micro=2,
        batch=8,
        recompute="full",
    ),
    # 9 query and 3 KV heads: the S² split falls inside a KV group; tied.
    "odd": Model("smollm2", {"num_hidden_layers": 4}, recompute="pointwise"),
    # Full attention, packed documents, and padding wherever ranks cut the sequence.
    "full": Model(
        "llama2",
        {"num_hidden_layers": 4, "num_key_value_heads": 4, "vocab_size": 131},
        attention="{kind: full}",
        sequence=61,
        packed=True,
        recompute="pointwise",
    ),
    "full tied": Model("smollm2", {"num_hidden_layers": 4}, attention="{kind: full}"),
    # Layers for two chunks on each of four stages, one uneven.
    "deep": Model("smollm2", {"num_hidden_layers": 9}, batch=8, recompute="gate_up"),
    # The odd heads, packed and padded.
    "odd packed": Model(
        "smollm2", {"num_hidden_layers": 4}, sequence=61, packed=True, recompute="full", targets="q, k, v, o"
    ),
    # Groups of three shards of four: keys come from as many as two ranks before.
    "far": Model(
        "llama2",
        {"num_hidden_layers": 2, "vocab_size": 131},
        "{kind: s2, group_size: 48}",
        61,
        recompute="gate_up",
        targets="q, k, v, o",
    ),
    # Odd KV groups shifted, packed and padded; the last steps of the run (from the second on) are full attention.
    "alternate": Model(
        "tinyllama",
        {"num_hidden_layers": 3, "num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 131},
        attention="{kind: s2, group_size: 16, shifted_heads: alternate, full_last_steps: 5}",
        sequence=61,
        packed=True,
        recompute="full",
        targets="q, k, v, o",
    ),
}

FROZEN_ENDS = {
    # Embedding and output matrix are frozen, and so are sharded by engine zero3; tied, one unit is used at both ends.
    "frozen": Model("llama2", {"num_hidden_layers": 5, "vocab_size": 131}, sequence=61, trainable="lora, norm"),
    "frozen tied": Model("smollm2", {"num_hidden_layers": 3}, recompute="full", trainable="lora", targets="q, k, v, o"),
}
_BLOCKS = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 131,
}
"""Whole blocks of 64 columns on two tensor-parallel ranks; 4 query and 2 KV heads."""
QUANTIZED = {
    "nf4": Model("llama2", _BLOCKS, sequence=61, packed=True, recompute="gate_up", kept="nf4"),
    # Frozen MLPs in tiles.
    "nf4 tiled": Model("llama2", _BLOCKS, recompute="full", targets="q, v, o", trainable="lora, norm", kept="nf4"),
    "fp8": Model("llama2", _BLOCKS, recompute="full", targets="q, v, o", trainable="lora, norm", kept="fp8"),
}
"""In test_quantized_base.py."""
MODELS |= FROZEN_ENDS | QUANTIZED
TWO = " two"
"""Ends the name of a model that takes two micro-batches a step."""
MODELS |= {name + TWO: replace(model, batch=2 * model.micro) for name, model in MODELS.items()}


@dataclass(frozen=True)
class Grid:
    tp: int = 1
    cp: int = 1
    pp: int = 1
    virtual: int = 1
    engine: str = ""
    """More settings of `parallel`."""


def of_grid(name: str, grid: Grid, world: int) -> tuple[str, Grid]:
    """A case, whose ranks take no more micro-batches than gradients need to be added up, unless in pipeline stages."""
    return name + TWO if grid.tp * grid.cp == world else name, grid


OFFLOAD = ", engine: zero3, offload: {params: cpu, optimizer: cpu}"
ZERO3 = ", engine: zero3"


def write_config(folder: Path, name: str, grid: Grid) -> Path:
    model = MODELS[name]
    base, text = folder / name / "base", folder / "text"
    path = folder / name / f"tp{grid.tp}-cp{grid.cp}-pp{grid.pp}-v{grid.virtual}{len(grid.engine)}.yaml"
    if not base.exists():
        make_tiny(base, model.kind, **model.over)
        write_tokenizer(base)
    if not text.exists():
        text.mkdir()
        rng = np.random.default_rng(0)
        with (text / "documents.jsonl").open("w") as file:
            for _ in range(120):
                words = rng.integers(0, 50, rng.integers(3, 60))
                document = " ".join(f"w{word % 25}{'abc'[word % 3]}" for word in words)
                file.write(json.dumps({"text": document}) + "\n")
    fields = {key: getattr(grid, key) for key in ("tp", "cp", "pp", "virtual", "engine")}
    trainable = model.trainable or ("lora, embed, norm" if model.tied else "lora, embed, norm, lm_head")
    path.write_text(
        YAML.format(
            base=base,
            kept=model.kept,
            text=text,
            cache=folder / "cache",
            attention=model.attention,
            sequence=model.sequence,
            packed=str(model.packed).lower(),
            micro=model.micro,
            batch=model.batch,
            recompute=model.recompute,
            targets=model.targets,
            trainable=trainable,
            output=folder / "never-written",
            **fields,
        )
    )
    return path


def _remember_masters(start: dict[str, torch.Tensor], run: Run) -> None:
    """Keep the weights a run starts from."""
    parts = run.trainer.parts
    masters, _ = whole_state(parts.model, parts.config.train.trainable, parts.optimizer)
    start.update({name: tensor.clone() for name, tensor in masters.items()})


def _observe(rank: int, world: int, paths: list[str], steps: int) -> list[dict[str, Any]]:
    """Each configuration in turn, in the same processes; `Observed` as dicts, which travel by value, and `start`."""
    # Several tiles a product, the last one shorter; the reference computes whole sequences.
    tile_size.LEAST_TOKENS, tile_size.TILE_ELEMENTS, loss.LEAST_TOKENS, loss.CHUNK_LOGITS = 14, 1, 28, 1
    query_plan.LEND_FROM = 0  # full attention's queries move at this length, too
    found = []
    for path in paths:
        try:
            start: dict[str, torch.Tensor] = {}
            observed = observe(
                load_config(Path(path), []), RankEnv.read(), steps, before=partial(_remember_masters, start)
            )
            found.append(vars(observed) | {"start": start})
        except Exception as error:
            raise AssertionError(path) from error
    return found if rank == 0 else []


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observed]:
    """What one process computes, by model."""
    names = {name for world in CASES for name, _ in cases_of(world)}
    return observe_alone(tmp_path_factory.mktemp("reference"), sorted(names), STEPS)


def observe_alone(folder: Path, names: list[str], steps: int) -> dict[str, Observed]:
    """What this process alone computes, by model."""
    torch.set_num_threads(1)
    return {
        name: observe(load_config(write_config(folder, name, Grid()), []), RankEnv(), steps, keep_world=False)
        for name in names
    }


TP2, TP4, CP2, CP4, CP8 = Grid(tp=2), Grid(tp=4), Grid(cp=2), Grid(cp=4), Grid(cp=8)
PP2, PP4, INTERLEAVED = Grid(pp=2), Grid(pp=4), Grid(pp=2, virtual=2)
TP2_PP2, TP2_CP2, PP2_CP2, TP2_PP2_CP2 = Grid(2, 1, 2), Grid(2, 2), Grid(1, 2, 2), Grid(2, 2, 2)
# By processes; what a grid leaves is data parallel.
CASES: dict[int, dict[Grid, tuple[str, ...]]] = {
    2: {
        Grid(): ("untied", "tied", "odd", "full"),
        TP2: ("untied", "tied", "full"),
        PP2: ("untied", "tied", "odd packed", "full", "full tied"),
        INTERLEAVED: ("odd", "full", "deep"),
        CP2: ("untied", "tied", "odd", "full"),
    },
    # The S² split inside a KV group, over tensor-parallel ranks.
    3: {Grid(tp=3): ("odd packed",), Grid(cp=3): ("full", "full tied")},
    4: {
        TP2: ("tied",),
        TP4: ("untied", "alternate", "full"),
        PP4: ("untied eight", "odd", "full", "full tied"),
        INTERLEAVED: ("tied", "full tied"),
        # megatron exchanges otherwise than between two stages.
        Grid(pp=4, virtual=2): ("deep",),
        CP4: ("untied", "odd", "far", "alternate", "full"),
        # Interleaving beside another axis; padded, packed.
        Grid(tp=2, pp=2, virtual=2): ("tied",),
        Grid(cp=2, pp=2, virtual=2): ("odd packed",),
        TP2_PP2: ("untied", "tied", "full"),
        TP2_CP2: ("untied", "tied", "alternate", "full"),
        PP2_CP2: ("untied", "odd", "alternate", "full"),
    },
    8: {
        CP8: ("untied", "odd", "alternate", "full"),
        TP2_PP2_CP2: ("untied", "tied", "alternate", "full"),
        PP2_CP2: ("full",),
    },
}


def cases_of(world: int) -> list[tuple[str, Grid]]:
    return [of_grid(name, grid, world) for grid, names in CASES[world].items() for name in names]


S2_MODELS = {name for name, model in MODELS.items() if "s2" in model.attention}
EVERY = (TP2, TP4, PP2, PP4, CP2, CP4, CP8, Grid(), TP2_PP2, TP2_CP2, PP2_CP2, TP2_PP2_CP2, INTERLEAVED)


@pytest.mark.parametrize("grid", EVERY, ids=str)
def test_every_grid_is_listed_with_both_kinds_of_attention(grid: Grid) -> None:
    """S² and full; and packed rows, tied and untied matrices wherever both meet the grid in another way."""
    names = {name for cases in CASES.values() for name in cases.get(grid, ())}
    assert names & S2_MODELS and names - S2_MODELS
    assert any(MODELS[name].packed for name in names)
    if grid.cp > 1 or grid.tp > 1:
        # 61 tokens never divide: padding.
        assert any(MODELS[name].sequence == 61 and name in S2_MODELS for name in names)
    if grid.tp > 1 or grid.pp > 1:
        assert {MODELS[name].tied for name in names} == {True, False}


def test_far_models_keys_come_from_several_ranks_before() -> None:
    """61 tokens over CP 4, in shards of 16."""
    far = MODELS["far"]
    heads = head_plan(0, 4, 4, 4, "upper_half")
    plan = halo_plan(SequenceLayout.dense(1, far.sequence), AttentionSpec("s2", 48), heads, equal_edges(4, 16))
    assert {message.receiver - message.sender for message in plan.messages} == {1, 2}


# Eight processes on two cores beside another test worker: minutes, most of them imports and waiting.
@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.crowd
@pytest.mark.parametrize("world", sorted(CASES))
def test_grids_equal_one_process(world: int, references: dict[str, Observed], tmp_path: Path) -> None:
    compare_all(world, cases_of(world), references, tmp_path)
    assert len(references["untied"].gradients) > 50


def _sums_started(rank: int, world: int, paths: list[str]) -> list[tuple[int, int]]:
    """By configuration: gradient buckets whose sum is under way when the backward is over, and all buckets."""
    optimizer.BUCKET_ELEMENTS = 300
    found: list[tuple[int, int]] = []
    finish = FlatGradients.finish

    def watched(gradients: FlatGradients) -> None:
        assert gradients.reducer is not None
        found.append((gradients.reducer.started, len(gradients.reducer.buckets)))
        finish(gradients)

    with mock.patch.object(FlatGradients, "finish", watched):
        for path in paths:
            observe(load_config(Path(path), []), RankEnv.read(), 0)
    return found


@pytest.mark.slow
@pytest.mark.crowd
def test_gradient_sums_travel_during_the_last_backward(tmp_path: Path) -> None:
    """With a pipeline too, where every chunk comes to its last micro-batch at another time."""
    cases = [("untied", Grid()), ("untied", PP2), ("tied", INTERLEAVED)]
    paths = [str(write_config(tmp_path, name, grid)) for name, grid in cases]
    for rank, found in enumerate(run_ranks(_sums_started, 4, paths, timeout=300)):
        for case, (started, buckets) in zip(cases, found, strict=True):
            assert started == buckets > 3, (rank, case)


def compare_all(
    world: int, cases: list[tuple[str, Grid]], references: dict[str, Observed], folder: Path, steps: int = STEPS
) -> None:
    paths = [str(write_config(folder, name, grid)) for name, grid in cases]
    found = run_ranks(_observe, world, paths, steps, timeout=1700)[0]
    for (name, grid), mine in zip(cases, found, strict=True):
        start = mine.pop("start")
        difference = compare(Observed(**mine), references[name])
        moved = tensor_errors(mine["trained"], references[name].trained, start)
        worst = max(moved, key=lambda tensor: moved[tensor])
        told = f"{name} {grid}: {difference}, moved {moved[worst]:.1e} {worst}"
        assert difference.loss <= 1e-5, told
        assert difference.norm <= 1e-5, told
        assert difference.gradient <= 1e-5, told
        # Of how far each tensor moved, to which fp32's rounding of weights near one is some 1e-5 a step.
        assert moved[worst] <= MOVED, told
        assert mine["frozen_kept"], told
        print(told)
