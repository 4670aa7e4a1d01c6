"""A run stopped on one grid goes on on another: the same command, the same losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.train import train
from tests.numerics.test_training import final, losses, run_here, write_run
from tests.support.ranks import run_ranks

BATCH = ["train.eps=1.0e-4"]
"""Adam's sign-like steps on gradients near zero would otherwise enlarge last-place differences."""


def _first_half(rank: int, world: int, path: str, grid: list[str]) -> None:
    train(load_config(Path(path), BATCH + grid), RankEnv.read(), 3)


def test_pipeline_and_tensor_parallel_to_one_process(tmp_path: Path) -> None:
    straight = write_run(tmp_path, "straight", kind="tinyllama")
    moved = write_run(tmp_path, "moved", kind="tinyllama")
    run_here(straight, BATCH)
    run_ranks(_first_half, 4, str(moved), ["parallel.tp=2", "parallel.pp=2"], timeout=240)
    assert len(losses(tmp_path / "moved")) == 3
    run_here(moved, BATCH)
    assert np.allclose(losses(tmp_path / "moved"), losses(tmp_path / "straight"), rtol=1e-5)
    mine, theirs = final(tmp_path / "moved"), final(tmp_path / "straight")
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert (mine[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
