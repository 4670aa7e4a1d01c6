"""A rank that raises, dies or hangs ends the whole job: in time, with its name, step and cause told once, leaving
nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from parallel.health.liveness import SIGNAL_S, SILENCE_S, Beat, Peers, machine
from parallel.health.stacks import pending
from parallel.health.watch import Watch, collective_timeout_s, watch_ranks
from parallel.world.rank_env import RankEnv
from tests.numerics.test_training import write_run
from tests.support.ranks import reserved_port

ROOT = Path(__file__).parents[2]
START_S = 180.0
"""Longest a job may take: processes import torch and megatron, perhaps on two cores that others keep busy."""
END_S = 30.0
"""Longest from a fault to the end of every process; on an idle machine it is about a second."""
pytestmark = pytest.mark.usefixtures("forked")
QUIET = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Ended:
    """A job after its end."""

    codes: list[int]
    """Of the launcher, or of every rank."""
    text: str
    """Standard output and error of all."""
    at: float = field(default_factory=time.time)
    """Seconds of the clock."""

    @property
    def told(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


def marked(mark: str) -> list[psutil.Process]:
    """Living processes with `mark` in their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and any(mark in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """A word for the command line; no process that carries it may outlive the job."""
    word = f"{tmp_path}/mark"
    yield word
    until = time.monotonic() + 5
    while (left := marked(word)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        process.kill()
    assert not left, left


def start(mark: str, *words: object, torchrun: bool = True, world: int = 2) -> list[subprocess.Popen[bytes]]:
    """Launch `tests.integration.faulty`; output goes to the file `mark`.txt."""
    command = ["-m", "tests.integration.faulty", *map(str, words)]
    out = open(f"{mark}.txt", "ab")
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        environments: list[dict[str, str]] = [{}]
    else:
        with reserved_port() as port:
            launcher = []
            environments = [
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                for rank in range(world)
            ]
    with out:
        return [
            subprocess.Popen(
                [sys.executable, *launcher, *command], cwd=ROOT, env=os.environ | QUIET | more, stdout=out, stderr=out
            )
            for more in environments
        ]


def finish(mark: str, processes: list[subprocess.Popen[bytes]], limit_s: float = START_S) -> Ended:
    """Wait for the end of all; a job that does not end fails the test (and the fixture cleans up)."""
    until = time.monotonic() + limit_s
    codes = [process.wait(max(0.1, until - time.monotonic())) for process in processes]
    return Ended(codes, Path(f"{mark}.txt").read_text())


def run(mark: str, *words: object, torchrun: bool = True) -> Ended:
    return finish(mark, start(mark, *words, torchrun=torchrun))


def only_message(ended: Ended, *parts: str) -> None:
    """The one error told, which holds every part, of a job that failed on all ranks."""
    assert all(ended.codes), ended
    faulted = re.search(r"^fault at ([\d.]+)$", ended.text, re.MULTILINE)
    if "up" not in ended.text.splitlines():  # there the test itself did it, and timed it
        assert faulted and ended.at - float(faulted[1]) < END_S
    assert len(ended.told) == 1, ended.text
    assert all(part in ended.told[0] for part in parts), ended.told[0]


def wait_for(mark: str, text: str) -> None:
    until = time.monotonic() + START_S
    while text not in Path(f"{mark}.txt").read_text():
        assert time.monotonic() < until, Path(f"{mark}.txt").read_text()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("user_error", ("rank 1 failed at step 2: The text is missing; put it back.",)),
        # Through torchrun as users start it.
        pytest.param("kill", ("rank 1 died at step 2 (", "killed"), marks=pytest.mark.started),
    ],
)
def test_the_trainer_ends_with_the_cause(fault: str, parts: tuple[str, ...], mark: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, "mark")
    only_message(run(mark, fault, 1, 2, "--config", path), *parts)


@pytest.mark.parametrize("grid", [(), ("parallel.pp=2", "checks=true")], ids=["data parallel", "pipeline"])
def test_the_trainer_names_a_rank_that_hangs(grid: tuple[str, ...], mark: str, tmp_path: Path) -> None:
    settings = [word for setting in ("parallel.timeout_s=6", *grid) for word in ("--set", setting)]
    ended = run(mark, "hang", 1, 2, "--config", write_run(tmp_path, "mark"), *settings)
    folder = tmp_path / "mark/hang"
    only_message(
        ended,
        "rank 1 hangs at step 2: no progress for ",
        "faulty.py:",
        " in hang;",
        "parallel.timeout_s",
        # torch records no point-to-point message of gloo's.
        "" if grid else "; rank 0 waits in gloo:",
        f"the Python stacks and last collectives of every rank are in {folder}",
    )
    late, waiting = ((folder / f"rank-{rank}.txt").read_text() for rank in (1, 0))
    assert " in hang\n" in late and " in hang\n" not in waiting
    trace = (folder / "rank-0-gloo.json").read_text()
    assert grid or f"rank 0 waits in {pending(trace)};" in ended.told[0]


def test_an_unexpected_error_is_told_with_its_traceback(mark: str) -> None:
    ended = run(mark, "bug", 1, 3, 60, mark)
    only_message(ended, "rank 1 failed at step 3: RuntimeError: planted bug", "faulty.py:", "in bug")
    assert ended.text.count("Traceback (most recent call last):\n  File") >= 1
    assert ended.text.count("\nRuntimeError: planted bug") == 1


def test_rank_0_killed_under_torchrun(mark: str) -> None:
    only_message(run(mark, "kill", 0, 3, 60, mark), "rank 0 died at step 3 (", "killed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_without_launcher(rank: int, mark: str) -> None:
    """Rank 0 hosts the store then, which dies with it."""
    only_message(run(mark, "kill", rank, 3, 60, mark, torchrun=False), f"rank {rank} died at step 3 (", "killed")


def test_a_hanging_rank_is_named_with_the_line_it_stands_at(mark: str) -> None:
    ended = run(mark, "hang", 1, 3, 3, mark, torchrun=False)
    only_message(ended, "rank 1 hangs at step 3: no progress for ", "faulty.py:", " in hang;", "parallel.timeout_s")
    assert ended.codes == [1, 1]


@pytest.mark.parametrize(("rank", "torchrun"), [(0, True), (1, True), (0, False), (1, False)])
def test_a_stopped_rank_is_named_and_does_not_stay(rank: int, torchrun: bool, mark: str) -> None:
    """SIGSTOP: it answers nobody, not even the launcher's SIGTERM, until the rank that leaves lets it go on. Without
    a launcher rank 0 hosts the store, whose calls then never return."""
    # Ranks on busy cores come up seconds apart, and one that is late must not count as one that never came.
    ended = run(mark, "freeze", rank, 3, 6, mark, torchrun=torchrun)
    parts = (f"rank {rank} hangs at step 3", "no progress for ", "it is stopped (SIGSTOP, or a debugger)")
    only_message(ended, *parts)


def test_failure_before_groups_exist(mark: str) -> None:
    """The other rank waits in init_process_group, or has not even come up."""
    ended = run(mark, "user_error", 0, 0, 60, mark, torchrun=False)
    only_message(ended, "rank 0 failed before the first step (starting): Nothing to build from; name a model.")
    assert ended.codes == [2, 2]


def test_a_clean_run_leaves_nothing(mark: str) -> None:
    ended = run(mark, "none", 0, 1, 60, mark)
    assert ended.codes == [0] and not ended.told
    assert ended.text.count("left: ['MainThread']") == 2


def test_a_killed_launcher_leaves_no_orphans(mark: str) -> None:
    (launcher,) = start(mark, "leave_to_tests", 0, 1, 60, mark)
    wait_for(mark, "up")
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 10
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.1)
    only_message(Ended([-9], Path(f"{mark}.txt").read_text()), "the launcher (torchrun)", "died at step ")


def test_sigterm_ends_every_rank_at_once_and_blames_nobody(mark: str) -> None:
    ranks = start(mark, "leave_to_tests", 0, 1, 60, mark, torchrun=False)
    wait_for(mark, "up")
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    ended = finish(mark, ranks, 5)
    assert ended.codes == [143, 143] and not ended.told, ended


# What several machines would show, from beats alone.


def peers(*beats: Beat, world: int | None = None, host: str = "here") -> Peers:
    found = Peers(0, world or len(beats), 0.0, host)
    for beat in beats:
        found.update(beat, 0.0)
    return found


def text(found: Peers, now: float, timeout_s: float = 60.0) -> str | None:
    verdict = found.judge(now, timeout_s)
    return None if verdict is None else verdict.text


def again(found: Peers, now: float, *beats: Beat) -> None:
    for beat in beats:
        found.update(beat, now)


def test_silence_on_another_machine_is_a_death() -> None:
    found = peers(Beat(0, 1, 7, "training", host="here"), Beat(1, 1, 7, "training", host="there", pid=1))
    again(found, 100.0, Beat(0, 9, 7, "training", host="here"))
    assert text(found, SILENCE_S - 1, 600.0) is None
    told = text(found, SILENCE_S + 1, 600.0)
    assert told is not None and told.startswith("rank 1 died at step 7 (no sign of life for 31 s")
    again(found, SILENCE_S, Beat(1, 2, 7, "loading", patient=True, host="there"))
    assert text(found, 2 * SILENCE_S + 1, 600.0) is None, "a library may hold Python's lock while loading"


def test_nobody_hangs_while_one_moves_or_has_leave_to_stand_still() -> None:
    stuck = Beat(0, 1, 3, "training", 61.0, waiting=True, where="a.py:1 in f", host="here")
    moving = Beat(1, 1, 3, "training", 1.0, where="b.py:2 in g", host="here", pid=os.getpid())
    assert text(peers(stuck, moving, host="here"), 0.0) is None
    saving = Beat(1, 1, 3, "saving", 100.0, patient=True, host="here", pid=os.getpid())
    assert text(peers(stuck, saving), 0.0) is None
    for_ever = Beat(1, 1, 3, "saving", 361.0, patient=True, where="c.py:3 in h", host="here", pid=os.getpid())
    told = text(peers(stuck, for_ever), 0.0)
    assert told is not None and told.startswith("rank 1 hangs at step 3 (saving): no progress for 361 s; it stands at")


def test_a_rank_that_runs_ahead_until_its_queue_is_full_is_not_blamed() -> None:
    """On GPUs: the healthy ranks of a hung one's pipeline stage stand in launches, which no stack tells from work."""

    def at(rank: int, moves: int, line: int = 0, phase: str = "training") -> Beat:
        place = f"x.py:{rank} in f"
        return Beat(rank, 1, 3, phase, 61.0, where=place, host=f"host{rank}", moves=moves, line=line)

    told = text(peers(at(0, 30), at(1, 17), at(2, 5, line=1), at(3, 5, line=1)), 0.0)
    assert told is not None and told.startswith("rank 1 hangs at step 3: ") and "it stands at x.py:1 in f" in told
    told = text(peers(at(0, 18), at(1, 17), at(2, 5, line=1)), 0.0)
    assert told is not None and told.startswith("ranks 0, 1, 2 hang at step 3: "), "nobody is well ahead"
    told = text(peers(at(0, 30, phase="evaluation"), at(1, 17, phase="evaluation")), 0.0)
    assert told is not None and told.startswith("ranks 0, 1 hang"), "replicas evaluate windows of their own"


def test_a_deadlock_names_every_place() -> None:
    waiting = [
        Beat(rank, 1, 4, "training", 61.0, waiting=True, where=f"x.py:{rank} in f", host=f"host{rank}")
        for rank in range(3)
    ]
    told = text(peers(*waiting), 0.0)
    assert told is not None and told.startswith("all 3 ranks wait for each other at step 4")
    assert "rank 0 in x.py:0 in f; rank 1 in x.py:1 in f; rank 2 in x.py:2 in f" in told


def test_ranks_that_never_come_up_and_ranks_that_left() -> None:
    found = peers(Beat(0, 1, host="here"), world=3)
    assert text(found, 59.0) is None
    again(found, 60.0, Beat(0, 2, host="here"))
    told = text(found, 61.0)
    assert told is not None and told.startswith("ranks 1, 2 never came up: not heard of in 61 s, while 1 of 3 ranks")
    left = peers(Beat(0, 1, 5, "training", host="here"), Beat(1, 1, 5, "training", host="there", ended=True))
    again(left, 1000.0, Beat(0, 2, 5, "training", host="here"))
    assert text(left, 1000.0) is None


def test_a_machine_that_was_told_to_stop_ends_the_others() -> None:
    """Before there is anything to save; a moment later, since a launcher ends its processes so when another fails."""
    stopped = Beat(1, 1, 0, "loading", host="there", ended=True, signal=signal.SIGUSR1, patient=True)
    found = peers(Beat(0, 1, 0, "loading", host="here", patient=True), stopped)
    assert text(found, SIGNAL_S - 0.1) is None
    verdict = found.judge(SIGNAL_S + 0.1, 600.0)
    assert verdict is not None and (verdict.rank, verdict.code) == (1, 138)
    assert verdict.text.startswith("rank 1 was ended by SIGUSR1 before the first step (loading), and the others cannot")


def test_a_dead_process_is_seen_and_a_zombie_too() -> None:
    if not machine():
        pytest.skip("no /proc here: process ids of other ranks are not looked at")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        beat = Beat(1, 1, 2, "training", host=machine(), pid=child.pid)
        found = peers(Beat(0, 1, 2, "training", host=machine()), beat, host=machine())
        assert text(found, 0.0) is None
        child.kill()
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert (text(found, 0.0) or "").startswith("rank 1 died at step 2 (its process is gone")
    assert (text(found, 0.0) or "").startswith("rank 1 died")


def test_one_process_is_not_watched() -> None:
    watch = watch_ranks(RankEnv())
    assert type(watch) is Watch
    with pytest.raises(KeyError), watch:
        watch.progress(1)
        with watch.patient("loading"):
            raise KeyError
    assert collective_timeout_s(600.0) > 6 * 600.0
