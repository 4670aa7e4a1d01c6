"""The process that ranks and commands of tests are forked from: it has imported once what each would for seven seconds.

It has one thread and no process group, so that a fork of it is safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PRELOADED = ("tests.support.preloaded",)
TITLE = 1 << 14
"""Bytes that a fork has for its command line, and for its environment, where others look for them (/proc)."""


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables while a child (or the process that children are forked from) starts: before it imports torch."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def fork_context() -> Any:
    """multiprocessing's context whose processes are forks of the server, which runs (without CUDA devices)."""
    context = multiprocessing.get_context("forkserver")
    # A name that is not found is passed over; it makes room for a fork's command line.
    context.set_forkserver_preload([*PRELOADED, "_" * TITLE])
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with environment(quiet | {"LONGSPAN_ROOM": "_" * TITLE}):
        forkserver.ensure_running()
    return context


def die_with_server() -> None:
    """Never outlive the server, which does not outlive pytest, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def show_as(words: Sequence[str], variables: Mapping[str, str]) -> None:
    """Show a fork's own command line and environment in /proc, in place of the server's; Linux, else nothing."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return
    places = list(map(int, stat.read_text().rsplit(")", 1)[1].split()[45:49]))
    settings = [f"{name}={value}" for name, value in variables.items()]
    for texts, start, end in ((words, *places[:2]), (settings, *places[2:])):
        room = end - start
        shown = "".join(f"{text}\0" for text in texts).encode()[: room - 1]
        ctypes.memmove(start, shown + bytes(room - len(shown)), room)
