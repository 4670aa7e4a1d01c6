"""Families beyond Llama, Qwen2 and Mistral: whole runs, alone and on grids, against transformers and torch in fp64.

As `test_run_oracle`, whose tolerances hold here too: losses, norms, evaluations and every trained tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel.world.rank_env import RankEnv
from tests.numerics.movement import tensor_errors
from tests.numerics.run_cases import train_named, write_case
from tests.numerics.run_oracle import Oracle, Outcome
from tests.numerics.test_run_oracle import ZERO3, check, trained_alone
from tests.support.ranks import run_ranks

ONE: dict[str, dict[str, Any]] = {
    "qwen3": {"micro": 2, "recompute": "none"},
    "biased": {"targets": "q, v, o"},
    "windowed": {"group": "group_size: 16"},
}
TOGETHER = {"steps": 3, "full_last": 1}
GROUPS = {"windowed": ONE["windowed"]}
GRIDS: dict[str, dict[str, Any]] = {"tp2": {"tp": 2}, "cp2": {"cp": 2, "recompute": "none"}, "zero3": ZERO3}


@pytest.mark.parametrize("model", ONE)
def test_one_process(model: str, tmp_path: Path) -> None:
    oracle, expected = trained_alone(write_case(tmp_path, "run", model, **ONE[model]))
    assert min(tensor_errors(oracle.start, expected.weights, oracle.start).values()) > 0.9, "everything moves"


def _train_all(rank: int, world: int, paths: list[str]) -> None:
    for path in map(Path, paths):
        train_named(path, RankEnv.read())


def test_grids(tmp_path: Path) -> None:
    paths = {
        (model, grid): write_case(tmp_path, f"{model}-{grid}", model, **TOGETHER, **GROUPS.get(model, {}), **axes)
        for model in ONE
        for grid, axes in GRIDS.items()
        if model != "windowed" or grid == "tp2"  # evaluation needs whole sequences
    }
    run_ranks(_train_all, 2, [str(path) for path in paths.values()], timeout=300)
    oracles: dict[str, tuple[Oracle, Outcome]] = {}
    for (model, _), path in paths.items():
        if model not in oracles:
            oracle = Oracle(path)
            oracles[model] = oracle, oracle.run()
        check(path, *oracles[model])
