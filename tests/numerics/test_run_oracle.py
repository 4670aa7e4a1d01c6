"""`pipeline.train`, whole, against the run computed again from outside; and faults in its composition, each found.

Five steps of tiny models with packed documents (so that micro-batches score unequal numbers of tokens), a length that
no grid divides, clipping that works in some steps, a last part in full attention, evaluations before and after.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.axes import query_plan
from parallel.world.rank_env import RankEnv
from tests.numerics.dropout_masks import Masks, Replay, agreement, recorded
from tests.numerics.movement import tensor_errors
from tests.numerics.run_cases import LAYERS, MODELS, train_here, train_named, write_case
from tests.numerics.run_oracle import Oracle, Outcome, Tensors, distances, read_run
from tests.numerics.run_plants import DROPOUT_PLANTS, PLANTS, shared_masks
from tests.support.ranks import run_ranks

TOLERANCES = {
    "losses": 2e-6,
    "norms": 2e-6,
    "rates": 1e-12,
    "tokens": 0.0,
    # Weights near one move by some thousandths, and fp32 rounds each of the five updates.
    "weights": 1e-4,
    "exp_avg": 5e-6,
    "exp_avg_sq": 5e-6,
    "nll": 1e-6,
    "scored": 0.0,
}
"""Of fp32 against fp64, by what `distances` tells."""
FOUND = 10
"""A fault must show so many tolerances out."""
DROPOUT = 0.3
ONE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"micro": 2, "shifted": "alternate", "clip": 0, "recompute": "none"},
    "mistral": {"schedule": "constant", "masked": "false", "stride": "null", "sequence": 64, "targets": "q, v, down"},
    # For studies: all heads of odd layers; strided heads.
    "layers": {"shifted": "odd_layers"},
    "dilated": {"group": "group_fraction: 0.25, dilation: 2"},
}
ZERO3 = {"cp": 2, "engine": "zero3, offload: {params: cpu, optimizer: cpu}"}
GRIDS: dict[str, dict[str, Any]] = {"tp2": {"tp": 2}, "cp2": {"cp": 2}, "pp2": {"pp": 2}, "dp2": {}, "zero3": ZERO3}
CASES: dict[str, dict[str, Any]] = {
    **{f"llama-{grid}": axes for grid, axes in GRIDS.items()},
    # Two sequences a micro-batch, biases, odd groups shifted.
    **{f"qwen2-{grid}": {**GRIDS[grid], "model": "qwen2", "shifted": "alternate"} for grid in ("tp2", "zero3")},
    # Full attention in chunks, stage after stage; queries that move within a chunk.
    **{f"llama-{grid}-prefill": {**GRIDS[grid], "prefill": 14} for grid in ("pp2", "cp2")},
    "qwen2-dp2": {"model": "qwen2", "micro": 2},
    "mistral-pp2": {"pp": 2, "model": "mistral", "masked": "false"},
    # The second stage has the odd layer, whose number counts in the whole model; dilated heads on one rank of two.
    "layers-pp2": {"pp": 2, "shifted": "odd_layers"},
    "dilated-tp2": {"tp": 2, "group": "group_fraction: 0.25, dilation: 2"},
    **{f"dropout-{grid}": {**GRIDS[grid], "dropout": DROPOUT} for grid in ("tp2", "cp2")},
    # Chunks, three and a short one, spread over context ranks, of which a shard is shorter than half a group; over
    # tensor ranks; replicas.
    **{
        f"streamed-{grid}": {
            **GRIDS[grid],
            **{"group": "group_size: 16", "full_last": 0, "stream": 12, "sequence": 39, "steps": 2},
        }
        for grid in ("tp2", "cp2", "dp2", "zero3")
    },
    "shared": {"tp": 2, "dropout": DROPOUT, "steps": 2},
    **{f"bf16-{grid}": {**axes, "dtype": "bf16"} for grid, axes in GRIDS.items()},
}
"""Runs of two processes; all in one launch."""


def outside(told: dict[str, float]) -> dict[str, float]:
    """The figures beyond their tolerance, in tolerances."""
    return {key: error / (TOLERANCES[key] or 1e-12) for key, error in told.items() if error > TOLERANCES[key]}


def text(told: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.1e}" for key, value in told.items())


def check(path: Path, oracle: Oracle, expected: Outcome) -> None:
    told = distances(read_run(path.with_suffix("")), expected, oracle.start)
    assert not outside(told), f"{path.stem}: {text(told)}"


def trained_alone(path: Path) -> tuple[Oracle, Outcome]:
    """What one process must come to, having come to it."""
    train_here(path)
    oracle = Oracle(path)
    expected = oracle.run()
    check(path, oracle, expected)
    return oracle, expected


@pytest.mark.parametrize("model", ONE)
def test_one_process(model: str, tmp_path: Path) -> None:
    kind = model if model in MODELS else "llama"
    oracle, expected = trained_alone(write_case(tmp_path, "run", kind, **ONE[model]))
    # What is compared does move, and is looked at whole.
    assert (
        len(expected.weights) >= 14 and min(tensor_errors(oracle.start, expected.weights, oracle.start).values()) > 0.9
    )
    assert expected.losses[-1] < expected.losses[0] and expected.nll["after"].keys() == {50, 64}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, Outcome]:
    """A folder of cases, and what the oracle says of one that all plants are tried on."""
    folder = tmp_path_factory.mktemp("plants")
    oracle = Oracle(write_case(folder, "oracle"))
    return folder, oracle.start, oracle.run()


@pytest.mark.parametrize("name", PLANTS)
def test_fault_is_found(name: str, alone: tuple[Path, Tensors, Outcome]) -> None:
    folder, start, expected = alone
    path = write_case(folder, f"plant-{list(PLANTS).index(name)}")
    with PLANTS[name]():
        train_here(path)
    found = outside(distances(read_run(path.with_suffix("")), expected, start))
    print(f"\n{name}: {text(found)} (tolerances)")
    assert max(found.values(), default=0) > FOUND, name


def dropout_run(folder: Path, name: str, recompute: str) -> tuple[dict[str, float], list[Masks]]:
    """A run with dropout against an oracle that drops the same."""
    path = write_case(folder, name, dropout=DROPOUT, recompute=recompute, stride="null")
    with recorded() as masks:
        train_here(path)
    oracle = Oracle(path, drop=Replay([masks], 1, 1, LAYERS, DROPOUT))
    return distances(read_run(path.with_suffix("")), oracle.run(), oracle.start), [masks]


def assert_independent(ranks: list[Masks], name: str) -> None:
    """Kept as often as asked for, and no two masks alike: chance makes two agree in 58%, of 2,000 elements or more."""
    kept, alike = agreement(ranks)
    assert abs(kept - (1 - DROPOUT)) < 0.01 and alike < 0.66, (name, kept, alike)


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_dropout(recompute: str, tmp_path: Path) -> None:
    told, masks = dropout_run(tmp_path, "run", recompute)
    assert not outside(told), text(told)
    assert_independent(masks, recompute)


@pytest.mark.parametrize("name", DROPOUT_PLANTS)
def test_fault_with_dropout_is_found(name: str, tmp_path: Path) -> None:
    with DROPOUT_PLANTS[name]():
        told, _ = dropout_run(tmp_path, "run", "full")
    print(f"\n{name}: {text(outside(told))} (tolerances)")
    assert max(outside(told).values(), default=0) > FOUND, name


def _train_all(rank: int, world: int, paths: list[str]) -> dict[str, Masks]:
    """Every case in turn, in the same processes; the dropout masks of those that draw some."""
    query_plan.LEND_FROM = 0  # full attention's queries move at this length, too
    found = {}
    for path in map(Path, paths):
        planted = shared_masks() if path.stem == "shared" else contextlib.nullcontext()
        with recorded() as masks, planted:
            train_named(path, RankEnv.read())
        if "dropout" in path.stem or path.stem == "shared":
            found[path.stem] = masks
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_grids(tmp_path: Path) -> None:
    paths = {name: write_case(tmp_path, name, **over) for name, over in CASES.items()}
    ranks = run_ranks(_train_all, 2, [str(path) for path in paths.values()], timeout=800)
    oracles: dict[str, tuple[Oracle, Outcome]] = {}
    for name, path in paths.items():
        if name.startswith("bf16") or name == "shared":
            continue
        drop, masks = None, [found[name] for found in ranks if name in found]
        if masks:
            drop = Replay(masks, CASES[name].get("tp", 1), CASES[name].get("cp", 1), LAYERS, DROPOUT)
            assert_independent(masks, name)
        model = name if masks or name == "qwen2-dp2" else name.split("-")[0]
        if model not in oracles:
            oracle = Oracle(path, drop=drop)
            oracles[model] = oracle, oracle.run()
        check(path, *oracles[model])
    # Ranks that drop alike compute what an oracle with their masks does: that the masks are alike must show.
    _, alike = agreement([found["shared"] for found in ranks])
    assert alike > 0.9, "tensor-parallel ranks that share a seed go unseen"
    compare_bf16({name: path for name, path in paths.items() if name.startswith("bf16")})


def compare_bf16(paths: dict[str, Path]) -> None:
    """bf16 on a grid is no further from fp64 than twice what transformers in bf16 is."""
    some = next(iter(paths.values()))
    oracle = Oracle(some)
    expected = oracle.run()
    reference = Oracle(some, torch.bfloat16).run()
    allowed = errors(reference, expected, oracle.start)
    assert 1e-4 < allowed["losses"] < 0.1 and 1e-3 < allowed["weights"] < 0.5, "a reference that is no bf16"
    for name, path in paths.items():
        found = errors(read_run(path.with_suffix("")), expected, oracle.start)
        for key, limit in allowed.items():
            assert found[key] <= 2 * limit, f"{name} {key}: {found[key]:.2e}, and transformers in bf16 {limit:.2e}"
        print(f"{name}: " + ", ".join(f"{key} {found[key] / limit:.2f}" for key, limit in allowed.items()))


def errors(found: Outcome, expected: Outcome, start: Tensors) -> dict[str, float]:
    """Root mean square over steps, tensors or evaluations: one number's error is chance."""

    def rms(values: list[float]) -> float:
        return (sum(value**2 for value in values) / len(values)) ** 0.5

    def steps(key: str) -> float:
        return rms([a / b - 1 for a, b in zip(getattr(found, key), getattr(expected, key), strict=True)])

    told = {"losses": steps("losses"), "norms": steps("norms")}
    told["weights"] = rms(list(tensor_errors(found.weights, expected.weights, start).values()))
    for moment in expected.moments:
        told[moment] = rms(list(tensor_errors(found.moments[moment], expected.moments[moment], None).values()))
    told["nll"] = rms(
        [found.nll[label][n] / nll - 1 for label, all_ in expected.nll.items() for n, nll in all_.items()]
    )
    return told
