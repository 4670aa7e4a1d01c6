"""Every grid of ranks against one process: loss, norm and every gradient, before and after five steps; the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.groups import destroy_groups
from parallel.rank_env import RankEnv
from pipeline.config import load_config
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny, write_tokenizer
from tools.parity import Observed, compare, observe

STEPS = 5
YAML = """
model: {{path: {base}, context: 64, dtype: fp32, rope: {{type: linear, factor: 2}}}}
attention: {attention}
lora: {{rank: 4, targets: [q, k, v, o, gate, up, down]}}
data: {{path: {text}, sequence: {sequence}, mask_documents: {packed}, cache: {cache}}}
train: {{steps: 6, global_batch: {batch}, micro_batch: {micro}, lr: 1.0e-3, eps: 1.0e-4, warmup_steps: 2,
  recompute: {recompute}, trainable: [lora, embed, norm{head}]}}
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
    recompute: str = "none"


MODELS = {
    # Untied, 4 query and 4 KV heads, uneven layers; the sequence pads to whole shards.
    "untied": Model("llama2", {"num_hidden_layers": 5, "vocab_size": 131}, sequence=61),
    # Tied, GQA 8 / 4, packed documents; two sequences a micro-batch.
    "tied": Model(
        "tinyllama",
        {"num_hidden_layers": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 131},
        packed=True,
        micro=2,
        recompute="full",
    ),
    # 9 query and 3 KV heads: the S² split falls inside a KV group; tied.
    "odd": Model("smollm2", {"num_hidden_layers": 4}),
    "full": Model("llama2", {"num_hidden_layers": 4, "num_key_value_heads": 4}, attention="{kind: full}", packed=True),
}


@dataclass(frozen=True)
class Grid:
    tp: int = 1
    cp: int = 1
    pp: int = 1
    virtual: int = 1
    engine: str = ""
    """More settings of `parallel`."""


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
        for part in range(120):
            words = rng.integers(0, 50, rng.integers(3, 60))
            (text / f"{part:03d}.txt").write_text(" ".join(f"w{word % 25}{'abc'[word % 3]}" for word in words))
    fields = {key: getattr(grid, key) for key in ("tp", "cp", "pp", "virtual", "engine")}
    head = "" if model.over.get("tie_word_embeddings") or model.kind == "smollm2" else ", lm_head"
    path.write_text(
        YAML.format(
            base=base,
            text=text,
            cache=folder / "cache",
            attention=model.attention,
            sequence=model.sequence,
            packed=str(model.packed).lower(),
            micro=model.micro,
            batch=8,
            recompute=model.recompute,
            head=head,
            output=folder / "never-written",
            **fields,
        )
    )
    return path


def _observe(rank: int, world: int, paths: list[str]) -> list[dict[str, Any]]:
    """Each configuration in turn, in the same processes; `Observed` as dicts, which travel by value."""
    found = []
    for path in paths:
        try:
            found.append(vars(observe(load_config(Path(path), []), RankEnv.read(), STEPS)))
        except Exception as error:
            raise AssertionError(path) from error
    return found if rank == 0 else []


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observed]:
    """What one process computes, by model."""
    destroy_groups()
    folder = tmp_path_factory.mktemp("reference")
    torch.set_num_threads(1)
    return {
        name: observe(load_config(write_config(folder, name, Grid()), []), RankEnv(), STEPS, keep_world=False)
        for name in MODELS
    }


CASES: dict[int, list[tuple[str, Grid]]] = {
    2: [
        ("untied", Grid(tp=2)),
        ("tied", Grid(tp=2)),
        ("full", Grid(tp=2)),
        ("untied", Grid(pp=2)),
        ("tied", Grid(pp=2)),
        ("odd", Grid(pp=2, virtual=2)),
        ("untied", Grid()),
        ("odd", Grid()),
        ("untied", Grid(cp=2)),
        ("tied", Grid(cp=2)),
        ("odd", Grid(cp=2)),
        ("full", Grid(cp=2)),
        # Engine zero3: replicas and context-parallel ranks share the frozen weights.
        ("untied", Grid(engine=ZERO3)),
        ("tied", Grid(engine=OFFLOAD)),
        ("tied", Grid(cp=2, engine=ZERO3)),
        ("odd", Grid(cp=2, engine=OFFLOAD)),
        ("full", Grid(engine=OFFLOAD)),
    ],
    4: [
        ("untied", Grid(tp=4)),
        ("tied", Grid(tp=2, pp=2)),
        ("untied", Grid(pp=4)),
        ("tied", Grid(pp=2, virtual=2)),
        ("odd", Grid(pp=4)),
        ("untied", Grid(cp=4)),
        ("odd", Grid(cp=4)),
        ("tied", Grid(tp=2, cp=2)),
        ("untied", Grid(pp=2, cp=2)),
        ("full", Grid(tp=2, cp=2)),
        ("tied", Grid(tp=2)),
        ("untied", Grid(engine=ZERO3)),
        ("tied", Grid(engine=OFFLOAD)),
        ("untied", Grid(tp=2, engine=OFFLOAD)),
        ("tied", Grid(tp=2, engine=ZERO3)),
        ("odd", Grid(cp=4, engine=ZERO3)),
        ("untied", Grid(cp=4, engine=OFFLOAD)),
        ("tied", Grid(cp=2, engine=OFFLOAD)),
        ("full", Grid(cp=2, engine=ZERO3)),
    ],
    8: [
        ("untied", Grid(cp=8)),
        ("odd", Grid(cp=8)),
        ("tied", Grid(tp=2, pp=2, cp=2)),
        ("untied", Grid(tp=2, pp=2, cp=2)),
        ("full", Grid(pp=2, cp=2)),
    ],
}


# Eight processes on two cores beside another test worker: minutes, most of them imports and waiting.
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("world", sorted(CASES))
def test_grids_equal_one_process(world: int, references: dict[str, Observed], tmp_path: Path) -> None:
    paths = [str(write_config(tmp_path, name, grid)) for name, grid in CASES[world]]
    found = run_ranks(_observe, world, paths, timeout=600)[0]
    for (name, grid), mine in zip(CASES[world], found, strict=True):
        difference = compare(Observed(**mine), references[name])
        told = f"{name} {grid}: {difference}"
        assert difference.loss <= 1e-5, told
        assert difference.norm <= 1e-5, told
        assert difference.gradient <= 1e-5, told
        assert difference.trained <= 1e-5, told
        assert mine["frozen_kept"], told
        print(told)
    assert len(references["untied"].gradients) > 50
