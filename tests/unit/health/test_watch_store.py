"""A store that falls silent is noticed, and one that answers is not."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.health.verdict import Verdict
from parallel.health.watch import RankWatch
from parallel.health.watch_store import StoreMinder
from parallel.world.rank_env import RankEnv


def test_silence_is_counted_from_the_last_answer() -> None:
    answers, told, enough = [0], list[float](), threading.Event()

    def silent(seconds: float) -> None:
        told.append(seconds)
        if len(told) >= 3:
            enough.set()

    minder = StoreMinder(lambda: answers[0], 0.05, silent)
    assert enough.wait(10)
    minder.close()
    assert told[:3] == [0.05, 0.1, 0.15000000000000002] and not minder.is_alive()


def test_a_store_that_answers_is_left_alone() -> None:
    answers, told = iter(range(1 << 30)), list[float]()
    minder = StoreMinder(lambda: next(answers), 0.01, told.append)
    time.sleep(0.2)
    minder.close()
    assert not told


def silent_watch(failure: Verdict | None, secondary: bool, agent: bool) -> tuple[RankWatch, list[str]]:
    """Rank 1's watch of a job whose rank 0 is stopped, and what it did."""
    done = list[str]()
    watch = object.__new__(RankWatch)
    rank_0: Any = SimpleNamespace(rank=0)
    vars(watch).update(
        _env=RankEnv(rank=1, world_size=2, agent_store=agent),
        _timeout_s=10.0,
        _silence_s=30.0,
        _step=3,
        _phase="training",
        _failure=failure,
        _secondary_since=0.0 if secondary else None,
        _peers=SimpleNamespace(stopped=lambda: [rank_0], wake_stopped=lambda: done.append("woken")),
        _without_store=lambda: None,
        _end=lambda verdict, lost: done.append("ended"),
    )
    return watch, done


OWN = Verdict(1, "rank 1 failed")


@pytest.mark.parametrize(
    ("failure", "secondary", "blamed"),
    [(None, False, 0), (OWN, False, 1), (OWN, True, 0)],
    ids=["no failure", "its own", "a consequence"],
)
def test_a_stopped_host_is_blamed_unless_this_rank_failed_by_itself(
    failure: Verdict | None, secondary: bool, blamed: int
) -> None:
    watch, done = silent_watch(failure, secondary, agent=False)
    watch._store_silent(11.0)
    assert watch._failure is not None and watch._failure.rank == blamed and done == ["woken"]


def test_a_store_of_torchruns_agent_is_not_rank_0s() -> None:
    watch, done = silent_watch(None, False, agent=True)
    watch._store_silent(11.0)
    assert watch._failure is None and done == []
    watch._store_silent(31.0)
    assert done == ["ended"]
