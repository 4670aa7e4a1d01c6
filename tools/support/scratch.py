"""A folder for what stands in for a run's files: under a launcher one for all ranks of this machine, as a run's are."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv

READY = "ready"
PATIENCE_S = 300.0
"""Seconds that other ranks wait for the one that writes."""
_numbers = iter(range(1 << 30))


@contextlib.contextmanager
def scratch(env: RankEnv, name: str) -> Iterator[Path]:
    """An empty folder that is removed in the end.

    Ranks must come here in the same order: the number of times they did is part of the folder's name.
    """
    if not env.launched:
        with tempfile.TemporaryDirectory(prefix=f"longspan-{name}-") as folder:
            yield Path(folder)
        return
    # The launcher's process is the parent of all its ranks on this machine.
    shared = Path(tempfile.gettempdir()) / f"longspan-{name}-{os.getuid()}-{os.getppid()}-{next(_numbers)}"
    shared.mkdir(mode=0o700, exist_ok=True)
    try:
        yield shared
    finally:
        if env.local_rank == 0:
            shutil.rmtree(shared, ignore_errors=True)


def written_once[Made](env: RankEnv, folder: Path, work: Callable[[bool], Made]) -> Made:
    """What `work` returns: it is told to write on one rank of this machine, and not to on the others, after that one.

    Raises:
        ConfigError: that rank has not written within `PATIENCE_S`.
    """
    if not env.launched:
        return work(True)
    mark = folder / READY
    if env.local_rank == 0:
        found = work(True)
        mark.touch()
        return found
    until = time.monotonic() + PATIENCE_S
    while not mark.exists():
        if time.monotonic() > until:
            raise ConfigError(f"{folder}: rank 0 of this machine has written no stand-ins for {PATIENCE_S:.0f} s.")
        time.sleep(0.05)
    return work(False)
