"""Saving beside training: what is written is what was at the pause, and a failure is told at the next step."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError
from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import rng_state
from pipeline.checkpoint import saver, writer
from pipeline.checkpoint.choose import choose
from pipeline.checkpoint.manifest import FIELDS
from pipeline.checkpoint.saver import CheckpointSaver, StatePiece
from pipeline.checkpoint.tensors import whole_trained
from pipeline.storage import durable
from tests.support.ranks import run_ranks
from tests.support.single import single_groups

MANIFEST: dict[str, Any] = {"updates": 1, "config": {}}
NAME = "model.norm.weight"


def piece(value: float) -> StatePiece:
    return StatePiece(NAME, (6,), None, 0, 6, {field: torch.full((6,), value) for field in FIELDS})


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, inner = threading.Event(), writer.write_part

    def slow(*args: Any) -> None:
        assert gate.wait(30)
        inner(*args)

    monkeypatch.setattr(saver, "write_part", slow)
    made, live = CheckpointSaver(tmp_path, single_groups(), 2), piece(1.0)
    made.prepare([live])
    made.start(3, [live], rng_state(), MANIFEST)
    for tensor in live.state.values():
        tensor.fill_(2.0)  # the next step
    assert made.settle() == 0 and made.progress == 0.0 and choose(tmp_path) is None
    assert made.settle(15) == 15, "a wish to stop travels with it"
    gate.set()
    made.wait()
    assert made.progress is None and made.saved_step == 3
    assert torch.equal(whole_trained(tmp_path / "step-000003")[NAME], torch.ones(6))
    assert [line.split()[0] for line in made.news] == ["saving", "saved"]
    made.start(4, [live], rng_state(), MANIFEST)
    made.wait()
    assert torch.equal(whole_trained(tmp_path / "step-000004")[NAME], torch.full((6,), 2.0))


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_write_is_an_error_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    made = CheckpointSaver(tmp_path, single_groups(), 2, background=background)
    made.start(1, [piece(1.0)], rng_state(), MANIFEST)
    made.wait()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_arrays", full)
    made.start(2, [piece(2.0)], rng_state(), MANIFEST)
    job = made._job
    assert job is not None
    if job.thread is not None:
        job.thread.join()
    with pytest.raises(CheckpointError, match=r"step-000002: could not be written \(.*No space left .* untouched"):
        made.settle()
    monkeypatch.undo()
    choice = choose(tmp_path)
    assert choice is not None and choice.step == 1 and not choice.warnings
    made.start(2, [piece(2.0)], rng_state(), MANIFEST)
    made.wait()
    assert (tmp_path / "latest").read_text() == "step-000002\n"


def test_a_failed_publication_and_a_lost_lock_are_errors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken() -> None:
        raise CheckpointError("another job took over.")

    made = CheckpointSaver(tmp_path, single_groups(), 2, still_ours=taken)
    made.start(1, [piece(1.0)], rng_state(), MANIFEST)
    with pytest.raises(CheckpointError, match=r"step-000001: could not be written \(another job took over"):
        made.wait()
    (tmp_path / "a file").write_text("")
    blocked = CheckpointSaver(tmp_path / "a file", single_groups(), 2)
    blocked.start(1, [piece(1.0)], rng_state(), MANIFEST)
    with pytest.raises(CheckpointError, match="could not be written"):
        blocked.wait()
    assert durable.PRIVATE_FILE == 0o600


def test_an_old_checkpoint_that_stays_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a folder is not empty while somebody reads its files."""
    inner = writer.remove

    def busy(path: Path) -> None:
        if "old-" in path.name:
            raise OSError(39, "Directory not empty", str(path))
        inner(path)

    monkeypatch.setattr(writer, "remove", busy)
    made = CheckpointSaver(tmp_path, single_groups(), 1)
    for step in (1, 2, 3):
        made.start(step, [piece(float(step))], rng_state(), MANIFEST)
        made.wait()
        assert made.saved_step == step
    told = [line for line in made.news if "could not be removed" in line]
    assert len(told) == 3, "step 1 after 2; steps 1 and 2 after 3"
    assert told[0].startswith(
        f"{tmp_path}/.writing-old-step-000001: could not be removed (Directory not empty); no run"
    )
    choice = choose(tmp_path)
    assert choice is not None and choice.step == 3 and not choice.warnings
    assert len(writer.clear_unfinished(tmp_path)) == 2, "a resume tells it and goes on"
    monkeypatch.undo()
    assert writer.prune(tmp_path, 1, 0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000003"]


def _save_at_once(rank: int, world: int, folder: str) -> list[int | None]:
    """Rank 0 takes its time to publish; the other one has heard that all is written, and saves the next step."""
    inner, found = saver.publish, []

    def slow(*args: Any) -> Path:
        time.sleep(1.0)
        return inner(*args)

    saver.publish = slow
    groups = make_groups(plan_grid(world, 1, 1, 1), RankEnv.read())
    made = CheckpointSaver(Path(folder), groups, 9)
    for step in (1, 2, 3):
        half = {field: torch.full((3,), float(step)) for field in FIELDS}
        made.start(step, [StatePiece(NAME, (6,), None, 3 * rank, 3 * rank + 3, half)], rng_state(), MANIFEST)
        while made.progress is not None:
            made.settle()  # as between micro-batches, where a signal may ask to save and leave at once
        found.append(made.saved_step)
    made.wait()
    destroy_groups()
    return found


def test_the_next_save_waits_until_rank_0_has_published(tmp_path: Path) -> None:
    assert run_ranks(_save_at_once, 2, str(tmp_path)) == [[1, 2, 3]] * 2
    choice = choose(tmp_path)
    assert choice is not None and choice.step == 3 and not choice.warnings
    assert all(torch.equal(whole_trained(tmp_path / f"step-{n:06d}")[NAME], torch.full((6,), float(n))) for n in (1, 2))
