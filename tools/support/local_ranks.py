"""A module run as several local processes: one free port, a hard time-out, no process left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from parallel.errors import LongspanError
from tools.support.nccl import nccl_file, nccl_settings

GRACE_S = 2.0
"""Seconds after the first failure in which the others may tell of theirs."""
POLL_S = 0.05
ROOT = Path(__file__).parents[2]


class RankFailed(LongspanError):
    """A local process failed, or all of them took too long."""

    def __init__(self, text: str, code: int | None) -> None:
        super().__init__(text)
        self.code = code
        """Exit code of the first that failed; None: time was up."""


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, however that went (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _killed(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Kill and reap what still runs, with its own children, on the way out."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait()


def run_local(module: str, arguments: Sequence[str], world: int, logs: Path, timeout_s: float, cuda: bool) -> None:
    """Run `python -m module RANK WORLD arguments...` for every rank and wait.

    MASTER_ADDR and MASTER_PORT tell the ranks where to meet.

    Args:
        logs: folder that gets rank-N.log, each rank's output and errors.
        timeout_s: for everything; then all are killed.
        cuda: False hides CUDA devices, so that the result is the same on every machine.

    Raises:
        RankFailed: which rank, how, and the end of its log.
    """
    # Bound but not listening: only rank 0's SO_REUSEADDR listener can take it.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder, contextlib.ExitStack() as stack:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        environment = (
            (nccl_settings(nccl_file()) if cuda else {})
            | dict(os.environ)
            | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(holder.getsockname()[1]),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(
                    ":"
                ),
            }
        )
        if not cuda:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        processes: list[subprocess.Popen[bytes]] = []
        stack.enter_context(_killed(processes))
        for rank in range(world):
            log = stack.enter_context((logs / f"rank-{rank}.log").open("wb"))
            command = [sys.executable, "-m", module, str(rank), str(world), *arguments]
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        _wait(processes, logs, time.monotonic() + timeout_s, timeout_s)


def _wait(processes: list[subprocess.Popen[bytes]], logs: Path, deadline: float, timeout_s: float) -> None:
    failed: int | None = None
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    failed = (
        next((rank for rank, process in enumerate(processes) if process.poll()), None) if failed is None else failed
    )
    if failed is not None:
        text = (logs / f"rank-{failed}.log").read_text(errors="replace")
        code = processes[failed].poll()
        # Code 2 is a sentence for the user, which is the log's last line.
        sentence = (
            text.strip().splitlines()[-1] if code == 2 else f"rank {failed} left with code {code}:\n{text[-3000:]}"
        )
        raise RankFailed(sentence, code)
    late = [rank for rank, process in enumerate(processes) if process.poll() is None]
    if late:
        raise RankFailed(f"ranks {late} still ran after {timeout_s:g} s and were ended; raise --timeout.", None)
