"""A run saved on one layout goes on on any other: the same state to the bit, the same next loss and next update."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.training import restore
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.state import whole_state
from tests.numerics.movement import tensor_errors
from tests.numerics.test_training import write_run
from tests.support.ranks import run_ranks
from tests.support.runs import build_run

STEPS = 2
LOSS, UPDATE = 1e-6, 1e-4
"""Relative differences allowed of the next loss, and of the next update to its size: gradients are summed in another
order, and Adam magnifies those near zero."""
Layout = dict[str, int | str]
Seen = dict[str, Any]
"""What a run that goes on finds and does: start (its step), state (masters, moments and their count), loss (of the next
step), updated (masters after it)."""
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


def run_on(path: str, layout: Layout, output: Path, steps: int) -> Seen:
    """Go on for some steps and save them; what is there then, whole, on rank 0, and one more step."""
    env = RankEnv.read()
    overrides = [f"parallel.{axis}={size}" for axis, size in layout.items()]
    run = build_run(load_config(Path(path), [*overrides, f"output={output}"]), env)
    try:
        trainer, parts, start = run.trainer, run.trainer.parts, run.trainer.step

        def whole() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            found = whole_state(parts.model, parts.config.train.trainable, parts.optimizer)
            return tuple({name: tensor.clone() for name, tensor in part.items()} for part in found)  # type: ignore[return-value]

        for step in range(start, start + steps):
            trainer.update(step, trainer.gradients(step))
            trainer.step += 1
        if steps:
            trainer.save()
        masters, moments = whole()
        row = trainer.gradients(trainer.step)
        trainer.update(trainer.step, row)
        return {"start": start, "state": masters | moments, "loss": row["loss"], "updated": whole()[0]}
    finally:
        run.trainer.parts.saver.close()
        run.trainer.parts.loader.close()
        destroy_groups(keep_world=env.launched)


def differences(seen: Seen, saved: Seen) -> tuple[bool, float, float]:
    """Whether masters and moments are those saved, to the bit; how far loss and update are from the unbroken run's."""
    mine, theirs = seen["state"], saved["state"]
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    updates = tensor_errors(seen["updated"], saved["updated"], theirs)
    return same, abs(seen["loss"] / saved["loss"] - 1), max(updates.values())


def _matrix(rank: int, world: int, path: str, folder: str) -> tuple[list[Seen], dict[tuple[int, int], Seen]]:
    saved = [run_on(path, layout, Path(folder) / f"on-{i}", STEPS) for i, layout in enumerate(LAYOUTS)]
    found = {}
    for i in range(len(LAYOUTS)):
        to = (i + 1) % len(LAYOUTS)
        found[i, to] = run_on(path, LAYOUTS[to], Path(folder) / f"on-{i}", 0)
    for to in FROM_ONE:
        found[-1, to] = run_on(path, LAYOUTS[to], Path(folder) / "one", 0)
    return (saved, found) if rank == 0 else ([], {})


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_pair_of_layouts(tmp_path: Path) -> None:
    path = str(write_run(tmp_path, "matrix", kind="llama2"))
    alone = run_on(path, {}, tmp_path / "one", STEPS)
    saved, found = run_ranks(_matrix, 4, path, str(tmp_path), timeout=900)[0]
    again = run_on(path, {}, tmp_path / "one", 0)
    assert differences(again, alone) == (True, 0.0, 0.0) and again["start"] == STEPS
    for i in TO_ONE:
        found[i, -1] = run_on(path, {}, tmp_path / f"on-{i}", 0)
    told = {pair: differences(seen, alone if pair[0] < 0 else saved[pair[0]]) for pair, seen in found.items()}
    loss, update = (max(row[index] for row in told.values()) for index in (1, 2))
    print(f"\npairs of layouts: {len(told)}, worst relative difference of loss {loss:.1e}, of update {update:.1e}")
    assert len(told) >= 12
    for pair, (same, loss, update) in told.items():
        assert found[pair]["start"] == STEPS and same, pair
        assert loss <= LOSS and update <= UPDATE, (pair, loss, update)


@pytest.mark.parametrize("lost", ["moments", "count", "masters"])
def test_state_that_is_lost_shows(lost: str, tmp_path: Path) -> None:
    """The comparison above can fail: a resume that loses a part of the state is seen, each where it should be."""
    path = str(write_run(tmp_path, "run", kind="llama2"))
    saved = run_on(path, {}, tmp_path / "one", STEPS)
    honest = restore.load_state

    def losing(model: Any, kinds: Any, optimizer: TrainableAdamW, reader: Any) -> None:
        before = optimizer.masters() if lost == "masters" else {}
        before = {name: tensor.clone() for name, tensor in before.items()}
        honest(model, kinds, optimizer, reader)
        for slot in optimizer._slots:
            if lost == "moments":
                slot.exp_avg_sq.zero_()
            elif lost == "count":
                slot.steps.zero_()
            else:
                slot.master.copy_(before[slot.trained.name])

    with mock.patch.object(restore, "load_state", losing):
        same, loss, update = differences(run_on(path, {}, tmp_path / "one", 0), saved)
    print(f"\n{lost}: same {same}, loss {loss:.1e}, update {update:.1e}")
    assert same == (lost == "count") and update > 100 * UPDATE
    assert (loss > 100 * LOSS) == (lost == "masters")
