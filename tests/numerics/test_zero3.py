"""Engine zero3: what each rank keeps and reads, when weights are whole, and that nothing else differs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.axes.zero3 import ALIGN, FrozenShards, Unit, deepspeed_config
from parallel.errors import ConfigError
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import open_base, read_arch
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.entry import open_evaluator
from pipeline.training.gradients import ALIGN_ELEMENTS
from pipeline.training.schedule import learning_rate
from tests.numerics.test_parallel_parity import OFFLOAD, Grid, write_config
from tests.support.optimizer_state import state_bytes
from tests.support.ranks import run_ranks
from tests.support.runs import build_run
from tools import dry_run

STEPS = 3


def _look(rank: int, world: int, path: str) -> dict[str, Any]:
    """A bf16 run with offload on two replicas, step by step."""
    extra = [
        "model.dtype=bf16",
        "model.context=32768",
        "model.rope.factor=512",
        f"eval.path={Path(path).parents[1] / 'text'}",
        "eval.windows=3",
        "eval.lengths=[32]",
    ]
    config = load_config(Path(path), extra)
    base = open_base(config, read_arch(Path(config.model.path)))
    run = build_run(config, RankEnv.read(), base=base)
    parts = run.trainer.parts
    shards = parts.model.shards
    assert shards is not None
    named = dict(parts.model.canonical_parameters())
    sharded = {name: p for name, p in named.items() if shards.holds(p)}
    found: dict[str, Any] = {
        "share": sum(share.numel() * share.element_size() for _, share in shards.shares()),
        "dtypes": sorted({str(parameter.dtype) for parameter in sharded.values()}),
        "elements": [sum(shape.numel() for shape in unit.shapes) for unit in shards.units],
        "empty before": all(p.numel() == 0 for p in sharded.values()),
        "frozen state": [name for name, p in named.items() if not p.requires_grad and hasattr(p, "main_grad")],
        "state": state_bytes(parts.optimizer),
        "trained": sum(p.numel() for p in named.values() if p.requires_grad),
        "devices": sorted({slot.master.device.type for slot in parts.optimizer._slots}),
        "read": base.bytes_read,
        "whole": sum(fact.nbytes for fact in base.facts.values()),
        "rates": [],
        "losses": [],
    }
    evaluator = open_evaluator(run.plan, parts.model, run.groups, run.tokenizer)
    found["perplexity"] = []
    for step in range(STEPS):
        row = run.trainer.gradients(step)
        run.trainer.update(step, row)
        found["rates"].append(row["lr"])
        found["losses"].append(row["loss"])
        # Three windows on two replicas: one of them runs the model for nothing, or both would wait for ever.
        found["perplexity"].append(evaluator.run("x", step, shown=False).perplexity[32])
    found["whole at once"] = sum(p.numel() > 0 for p in sharded.values())
    found["sharded"] = len(sharded)
    found["gradients of frozen"] = [n for n, p in named.items() if not p.requires_grad and p.grad is not None]
    # Positions up to 32k: the angle of the slowest and the fastest pair, from the plan in fp64.
    spec, layout = parts.spec, parts.model.place(parts.loader.step(0)[0]).layout
    stage = parts.model.stages[0]
    long = type(layout).build(1, 32768, None, None)
    context = stage.context(long, spec)
    found["cos"], found["cos dtype"] = context.cos[-1].flatten().clone(), str(context.cos.dtype)
    run.trainer.parts.saver.close()
    run.trainer.parts.loader.close()
    destroy_groups(keep_world=True)
    return found


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("zero3")
    path = str(write_config(folder, "frozen", Grid(engine=OFFLOAD)))
    return run_ranks(_look, 2, path, timeout=240), path


def test_frozen_weights_cost_two_bytes_over_all_ranks_and_nothing_else(
    observed: tuple[list[dict[str, Any]], str],
) -> None:
    ranks, _ = observed
    for found in ranks:
        padding = ALIGN * 8 * len(found["elements"])
        assert found["dtypes"] == ["torch.bfloat16"]  # of the sharded parameters; a share is bytes
        assert abs(found["share"] - sum(found["elements"])) <= padding  # 2 bytes an element, two ranks
        assert found["frozen state"] == found["gradients of frozen"] == []
        # fp32 master and two moments of what trains, half of it each, and the padding of its slices.
        assert found["state"] <= 6 * found["trained"] + 12 * 2 * ALIGN_ELEMENTS * 200
        assert found["devices"] == ["cpu"]
    assert sum(found["state"] for found in ranks) >= 12 * ranks[0]["trained"]


def test_a_rank_reads_its_stretch_of_the_files(observed: tuple[list[dict[str, Any]], str]) -> None:
    ranks, _ = observed
    # Rows at a share's edge, and the norms that both keep, are read twice.
    assert sum(found["read"] for found in ranks) <= 1.3 * ranks[0]["whole"]
    for found in ranks:
        assert found["read"] <= 0.7 * found["whole"]


def test_weights_are_whole_three_units_at_a_time(observed: tuple[list[dict[str, Any]], str]) -> None:
    for found in observed[0]:
        assert found["empty before"]
        assert 0 < found["whole at once"] <= 12 < found["sharded"]  # at most three layers of four matrices


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_units_are_there_before_they_are_used(ahead: int) -> None:
    """Forward, backward and forward again through five units, one used at both ends, with a buffer for each ahead."""
    shards = FrozenShards.__new__(FrozenShards)
    shards.ahead, shards.world, shards.rank, shards._backward, shards._streams = ahead, 1, 0, False, None
    shards.device = torch.device("cpu")
    shards._holds = [None] * (ahead + 1)
    shards._slots = [torch.full((4,), -1.0).view(torch.uint8) for _ in range(ahead + 1)]
    units = [
        Unit(str(n), [torch.nn.Parameter(torch.empty(0), False)], [torch.Size((4,))], [(0, 16)], 16) for n in range(5)
    ]
    for number, unit in enumerate(units):
        share = torch.full((4,), float(number)).view(torch.uint8)
        unit.flat = SimpleNamespace(ds_tensor=SimpleNamespace(data=share))
    shards.order = [*units, units[0]]
    fetched: list[str] = []
    fetch = shards._fetch
    shards._fetch = lambda unit, keep: (fetched.append(unit.name), fetch(unit, keep))[1]  # type: ignore[method-assign]
    last = len(shards.order) - 1
    for way in (range(last + 1), range(last, -1, -1), range(last + 1)):
        shards._backward = way.step < 0
        for position in way:
            shards.use(position)
            ends = (position, position + way.step * ahead)
            near = shards.order[max(0, min(ends)) : max(ends) + 1]
            assert all(unit.slot is not None for unit in near) and sum(u.slot is not None for u in units) <= ahead + 1
            unit = shards.order[position]
            assert torch.equal(unit.parameters[0].view(torch.uint8), unit.flat.ds_tensor.data)
    # What is still there when the direction turns is not fetched again.
    assert len(fetched) <= 5 + 3 * 6 - 2 * (ahead + 1)


def test_evaluation_between_steps_with_an_odd_window(observed: tuple[list[dict[str, Any]], str]) -> None:
    first, second = observed[0]
    assert first["perplexity"] == second["perplexity"] and len(first["perplexity"]) == STEPS
    assert all(torch.isfinite(torch.tensor(first["perplexity"])))
    assert first["losses"] == second["losses"]


def test_the_learning_rate_is_ours(observed: tuple[list[dict[str, Any]], str]) -> None:
    ranks, path = observed
    train = load_config(Path(path), []).train
    wanted = [
        learning_rate(step, train.lr, train.warmup_steps, train.steps, train.schedule, train.min_lr_ratio)
        for step in range(STEPS)
    ]
    assert wanted[0] > 0
    for found in ranks:
        assert found["rates"] == wanted


def test_positions_are_fp32_at_32k(observed: tuple[list[dict[str, Any]], str]) -> None:
    found = observed[0][0]
    assert found["cos dtype"] == "torch.float32"
    half = found["cos"].numel()
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    expected = torch.cos(32767 / 512 * frequencies)  # linear interpolation
    assert (found["cos"].double() - expected).abs().max() < 1e-4
    rounded = torch.cos(32767 / 512 * frequencies.bfloat16().double())
    assert (rounded - expected).abs().max() > 1e-2  # what bf16 frequencies would give


def test_deepspeed_is_told_one_batch_and_nothing_of_learning() -> None:
    config = deepspeed_config(torch.bfloat16, micro_batch=2, accumulation=3, replicas=4)
    assert config["train_batch_size"] == 24
    assert not config.keys() & {"optimizer", "scheduler", "gradient_clipping"}
    assert config["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["parallel.pp=2"], "engine zero3 has no pipeline stages"),
        (["parallel.virtual=2"], "no pipeline stages to interleave"),
        (["parallel.offload.params=nvme"], "nvme is not supported"),
        (["parallel.offload.optimizer=nvme"], "nvme is not supported"),
        (["parallel.engine=megatron"], "engine megatron keeps everything on the GPU"),
    ],
)
def test_what_is_refused(settings: list[str], told: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, "untied", Grid(engine=OFFLOAD))
    with pytest.raises(ConfigError, match=told):
        load_config(path, settings)


def test_dry_run_of_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, "odd", Grid(cp=2, engine=OFFLOAD))
    figures = tmp_path / "figures.jsonl"
    assert dry_run.main(["--config", str(path), "--nproc", "8", "--rank", "1", "--json", str(figures)]) == 0
    assert '"skipped steps": 0' in figures.read_text()
    assert "rank 1 of 8, zero3, tp 1 cp 2" in capsys.readouterr().out
    # DeepSpeed wants LOCAL_RANK; left behind, it would make this process's next run refuse its environment.
    assert not RankEnv.read().launched
