"""Pairs of ranks, forked from a process that has imported everything, and killed; for test_kill_savers.

A rank costs eight seconds of imports, a fork none. It is safe on a CPU as long as the forking process has one thread
and no process group, which is asserted. Every pair is two real ranks: gloo, sockets, threads, files and SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from tests.support.ranks import reserved_port

WORLD = 2
BOTH = (0, 1)
START_S = 60.0
"""Longest for a pair to meet, or for one save."""
END_S = 60.0
"""Longest for the survivor of a kill to end, on a machine that does other things."""


class Board:
    """Numbers that ranks leave for whoever watches them, in shared memory: a killed process cannot take them along."""

    def __init__(self, places: int) -> None:
        self._map = mmap.mmap(-1, 8 * places)
        self._values = memoryview(self._map).cast("q")

    def __getitem__(self, place: int) -> int:
        return self._values[place]

    def __setitem__(self, place: int, value: int) -> None:
        self._values[place] = value


class Pair:
    """Two forked ranks that run `work(rank)`; a context manager that leaves nothing behind.

    Args:
        log: gets what both print.
    """

    def __init__(self, work: Callable[[int], int], log: Path) -> None:
        until = time.monotonic() + START_S
        while len(os.listdir("/proc/self/task")) > 1:  # a joined thread is listed for a moment more
            assert time.monotonic() < until, "a fork would copy other threads' locks"
            time.sleep(0.001)
        self._left: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        """Exit codes by rank; -9: killed."""
        sys.stdout.flush()
        # The port stays reserved until the ranks have ended.
        self._stack = contextlib.ExitStack()
        port = self._stack.enter_context(reserved_port())
        for rank in range(WORLD):
            pid = os.fork()
            if not pid:
                _be(rank, port, log, work)
            self._left[rank] = pid

    def kill(self, victims: tuple[int, ...]) -> None:
        """SIGKILL to some ranks, at once: all are stopped first, so that none sees another's end and ends by itself."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for rank in victims:
                os.kill(self._left[rank], number)  # not reaped yet: the id is still its own

    def wait(self, limit_s: float) -> dict[int, int]:
        """Exit codes once both have ended; TimeoutError if one does not."""
        until = time.monotonic() + limit_s
        while self._left:
            self.poll()
            if self._left and time.monotonic() > until:
                raise TimeoutError(f"ranks {sorted(self._left)} still run after {limit_s:g} s")
            time.sleep(0.002)
        return self.codes

    def poll(self) -> bool:
        """Whether both run."""
        for rank, pid in list(self._left.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                del self._left[rank]
        return len(self._left) == WORLD

    def until(self, happened: Callable[..., bool], limit_s: float) -> bool:
        """Wait for it, looking every half millisecond; False if a rank ended first. TimeoutError: neither."""
        end = time.monotonic() + limit_s
        while not happened():
            if not self.poll():
                return happened()
            if time.monotonic() > end:
                raise TimeoutError(f"nothing happened in {limit_s:g} s")
            time.sleep(0.0005)
        return True

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._left.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._stack.close()


def _be(rank: int, port: int, log: Path, work: Callable[[int], int]) -> NoReturn:
    """The forked process."""
    code = 70
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the ranks die with the harness
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
        os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)
        code = work(rank)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def victims_of(dice: random.Random) -> tuple[int, ...]:
    """One rank or the other, or both at the same moment."""
    return dice.choice([(0,), (1,), BOTH])
