"""A run saved on one layout goes on on any other: the same loss at the first step, the same moments to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import build
from pipeline.config.yaml_file import load_config
from pipeline.training.state import whole_state
from tests.numerics.test_training import write_run
from tests.support.ranks import run_ranks

STEPS = 2
Layout = dict[str, int | str]
LAYOUTS: list[Layout] = [
    {"tp": 4},
    {"cp": 4},
    {},  # dp 4
    {"tp": 2, "pp": 2},
    {"tp": 2, "cp": 2},
    {"tp": 2},
    {"pp": 2, "cp": 2},
    {"pp": 2},
    {"cp": 2},
    {"engine": "zero3", "cp": 2, "offload.params": "cpu", "offload.optimizer": "cpu"},
    {"engine": "zero3", "tp": 2},
    {"tp": 2, "pp": 2},
    {"engine": "zero3", "offload.optimizer": "cpu"},
]
"""Of four ranks; each is saved on and resumed on by its neighbour. Both engines."""
FROM_ONE = [0, 3, 8, 9]
TO_ONE = [1, 4, 6, 9]


def run_on(path: str, layout: Layout, output: Path, steps: int) -> tuple[float, dict[str, torch.Tensor], int]:
    """Go on for some steps and save them; loss of the next step, and the state before it, whole, on rank 0."""
    env = RankEnv.read()
    overrides = [f"parallel.{axis}={size}" for axis, size in layout.items()]
    run = build(load_config(Path(path), [*overrides, f"output={output}"]), env)
    try:
        trainer, parts, start = run.trainer, run.trainer.parts, run.trainer.step
        for step in range(start, start + steps):
            trainer.update(step, trainer.gradients(step))
            trainer.step += 1
        if steps:
            trainer.save()
        masters, moments = whole_state(parts.model, parts.config.train.trainable, parts.optimizer)
        state = {name: tensor.clone() for name, tensor in (masters | moments).items()}
        return trainer.gradients(trainer.step)["loss"], state, start
    finally:
        run.trainer.parts.saver.close()
        run.trainer.parts.loader.close()
        destroy_groups(keep_world=env.launched)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _matrix(rank: int, world: int, path: str, folder: str, alone: float) -> list[dict[str, Any]]:
    saved = [run_on(path, layout, Path(folder) / f"on-{i}", STEPS) for i, layout in enumerate(LAYOUTS)]
    found = []
    for i in range(len(LAYOUTS)):
        to = (i + 1) % len(LAYOUTS)
        loss, state, start = run_on(path, LAYOUTS[to], Path(folder) / f"on-{i}", 0)
        ok = same(state, saved[i][1])
        found.append({"pair": (i, to), "loss": loss, "before": saved[i][0], "start": start, "moments": ok})
    for to in FROM_ONE:
        loss, _, start = run_on(path, LAYOUTS[to], Path(folder) / "one", 0)
        found.append({"pair": (-1, to), "loss": loss, "before": alone, "start": start, "moments": True})
    return found if rank == 0 else []


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_pair_of_layouts(tmp_path: Path) -> None:
    path = str(write_run(tmp_path, "matrix", kind="llama2"))
    alone, state, _ = run_on(path, {}, tmp_path / "one", STEPS)
    found = run_ranks(_matrix, 4, path, str(tmp_path), alone, timeout=900)[0]
    loss, again, start = run_on(path, {}, tmp_path / "one", 0)
    assert loss == alone and same(again, state) and start == STEPS
    for i in TO_ONE:
        loss, _, start = run_on(path, {}, tmp_path / f"on-{i}", 0)
        before = next(row["before"] for row in found if row["pair"][0] == i)
        found.append({"pair": (i, -1), "loss": loss, "before": before, "start": start, "moments": True})
    worst = max(abs(row["loss"] / row["before"] - 1) for row in found)
    print(f"\npairs of layouts: {len(found)}, worst relative difference of the first loss {worst:.2e}")
    assert len(found) >= 12
    for row in found:
        assert row["start"] == STEPS and row["moments"], row
        assert abs(row["loss"] / row["before"] - 1) <= 1e-6, row
