"""Work that rank 0 does for all: its text, its failures, no collective timeout; a base model's hash, read once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import DataError
from parallel.world.collectives import on_main_first, share_from_main
from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from pipeline.storage.durable import Damaged
from pipeline.training.non_finite import TrainingDiverged
from tests.support.ranks import run_ranks
from tests.support.single import single_groups

TIMEOUT_S = 3.0


class OfTwoParts(Damaged):
    """One that a sentence alone does not make, as `compatibility.OtherSetting`."""

    def __init__(self, sentence: str, found: str) -> None:
        super().__init__(sentence)
        self.found = found


def told(work: Any) -> tuple[str, str]:
    """Class and message of what `work` raises."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def raise_new(rank: int) -> str:
    """Raises an error of a class that is made here and now, on rank 0."""
    assert rank == 0, "only rank 0 may get here"
    raise type("New", (Damaged,), {})("is new.")


def shared(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Every kind of outcome in one set of processes, with a group timeout shorter than rank 0's work."""
    groups = make_groups(plan_grid(world, 1, 1, 1), RankEnv.read(), timeout_s=TIMEOUT_S)
    note = Path(folder) / "note"

    def slow() -> str:
        if rank == 0:
            time.sleep(TIMEOUT_S + 1.5)
            note.write_text("made by rank 0")
        return f"{rank} read: {note.read_text()}"

    def fails(error: Exception) -> Any:
        def work() -> str:
            raise error if rank == 0 else AssertionError("only rank 0 may get here")

        return work

    cpu = time.process_time()
    first = on_main_first(groups, slow)
    cpu = time.process_time() - cpu
    text = share_from_main(groups, lambda: f"héllo from {rank}")
    refused = told(lambda: on_main_first(groups, fails(DataError("text.txt: is empty; give it text."))))
    damaged = told(lambda: on_main_first(groups, fails(Damaged("step-000010: is cut off."))))
    diverged = told(lambda: share_from_main(groups, fails(TrainingDiverged("it has diverged."))))
    other = told(lambda: share_from_main(groups, fails(OfTwoParts("lora.rank was 8.", "rank"))))
    # What only rank 0 has imported.
    alone = told(lambda: share_from_main(groups, lambda: raise_new(rank)))
    broken = told(lambda: share_from_main(groups, fails(KeyError("bug"))))
    again = share_from_main(groups, lambda: f"again {rank}")
    destroy_groups()
    kinds = {"damaged": damaged, "diverged": diverged, "other": other, "alone": alone}
    return {"first": first, "cpu": cpu, "text": text, "refused": refused, "broken": broken, "again": again, **kinds}


def test_rank_0_works_for_all(tmp_path: Path) -> None:
    found = run_ranks(shared, 3, str(tmp_path), timeout=120)
    for rank, one in enumerate(found):
        assert one["first"] == f"{rank} read: made by rank 0"
        assert one["text"] == "héllo from 0"
        assert one["refused"] == ("DataError", "text.txt: is empty; give it text.")
        assert one["again"] == "again 0"
        assert one["cpu"] < 1.0, "waiting must not spin"
        assert one["damaged"] == ("Damaged", "step-000010: is cut off.")
        assert one["diverged"] == ("TrainingDiverged", "it has diverged.")
    assert [one["other"][0] for one in found] == ["OfTwoParts", "Damaged", "Damaged"]
    assert [one["alone"][0] for one in found] == ["New", "Damaged", "Damaged"]
    assert {one["other"][1] for one in found} == {"lora.rank was 8."}
    assert {one["alone"][1] for one in found} == {"is new."}
    assert found[0]["broken"] == ("KeyError", "'bug'")
    for one in found[1:]:
        assert one["broken"] == ("LongspanError", "Rank 0 failed (KeyError: 'bug'); see its traceback.")


def test_one_process_just_works() -> None:
    assert share_from_main(single_groups(), lambda: "mine") == "mine"
    assert on_main_first(single_groups(), lambda: 7) == 7
    with pytest.raises(DataError, match="gone"):
        on_main_first(single_groups(), lambda: (_ for _ in ()).throw(DataError("gone")))
