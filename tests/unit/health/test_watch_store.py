"""A store that falls silent is noticed, and one that answers is not; what a rank said last counts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from parallel.health.liveness import Beat, Peers, machine
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


def healthy_watch(env: RankEnv, store: HashStore, peers: Peers) -> RankWatch:
    """A rank's watch, without its thread, that has noticed nothing yet."""
    watch = object.__new__(RankWatch)
    vars(watch).update(_env=env, _store=store, _peers=peers, _timeout_s=60.0, _silence_s=30.0)
    vars(watch).update(_failure=None, _secondary_since=None, _closing=False, _exchanges=0)
    return watch


class LastWords(HashStore):
    """A store whose second rank takes leave, and ends, just after its beat was read."""

    def __init__(self, child: subprocess.Popen[bytes], ended: bool) -> None:
        super().__init__()
        self._child, self._ended = child, ended

    def multi_get(self, keys: list[str]) -> list[bytes]:
        texts: list[bytes] = super().multi_get(keys)
        if self._child.poll() is None:
            self.set(
                "beat/1", Beat(1, 2, 2, "training", host=machine(), pid=self._child.pid, ended=self._ended).encode()
            )
            self._child.kill()
            self._child.wait()
        return texts


@pytest.mark.parametrize("ended", [True, False], ids=["took leave", "died"])
def test_a_rank_that_leaves_while_its_beat_is_looked_at_has_not_died(ended: bool) -> None:
    if not machine():
        pytest.skip("no /proc here: process ids of other ranks are not looked at")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store, peers = LastWords(child, ended), Peers(0, 2, time.monotonic(), machine())
    for beat in (Beat(0, 1, 2, "training", host=machine()), Beat(1, 1, 2, "training", host=machine(), pid=child.pid)):
        store.set(f"beat/{beat.rank}", beat.encode())
        peers.update(beat, time.monotonic())
    assert peers.judge(time.monotonic(), 60.0) is None
    watch = healthy_watch(RankEnv(rank=0, world_size=2), store, peers)
    vars(watch).update(_publish=lambda ended: None)
    verdict = watch._exchange()
    if ended:
        assert verdict is None
    else:
        assert verdict is not None and verdict.text.startswith("rank 1 died at step 2 (its process is gone")


def test_who_closes_while_a_beat_is_exchanged_still_takes_leave() -> None:
    """The main thread may come to its end at any moment of the other; the last beat in the store must say so."""

    class ClosedMeanwhile(HashStore):
        def multi_get(self, keys: list[str]) -> list[bytes]:
            watch._closing = True
            texts: list[bytes] = super().multi_get(keys)
            return texts

    store, peers = ClosedMeanwhile(), Peers(1, 2, time.monotonic(), machine())
    watch = healthy_watch(RankEnv(rank=1, world_size=2, agent_store=True), store, peers)
    peer = Beat(0, 1, 2, "training", host="another machine")
    store.set("beat/0", peer.encode())
    peers.update(peer, time.monotonic())
    vars(watch).update(
        _hosting=False,
        _interval=0.01,
        _count=0,
        _step=2,
        _phase="training",
        _moved=time.monotonic(),
        _moves=0,
        _line=0,
        _patience=0,
        _ended_by=0,
        _main=threading.get_ident(),
        _sleep=lambda seconds: 0,
    )
    watch._run()
    assert Beat.decode(store.get("beat/1")).ended
