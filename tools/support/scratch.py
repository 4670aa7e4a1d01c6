"""A folder for what stands in for a run's files: under a launcher one for all ranks of a machine, as a run's are, and
of one path on all machines, since ranks must have the same settings."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv

WRITER, READY = "writer", "ready"
"""Files that hold the process id of the rank that writes, and of the one that has written."""
PATIENCE_S = 300.0
"""Seconds that other ranks wait for the one that writes."""
_numbers = iter(range(1 << 30))


@contextlib.contextmanager
def scratch(env: RankEnv, name: str) -> Iterator[Path]:
    """A folder for `written_once`, which is removed in the end.

    Ranks must come here in the same order: the number of times they did is part of the folder's name.
    """
    if not env.launched:
        with tempfile.TemporaryDirectory(prefix=f"longspan-{name}-") as folder:
            yield Path(folder)
        return
    # What all ranks of a job know alike, whichever process started each of them, and on whatever machine.
    job = f"{env.job} {env.master_host} {env.master_port} {env.attempt} {next(_numbers)}"
    shared = (
        Path(tempfile.gettempdir()) / f"longspan-{name}-{os.getuid()}-{hashlib.sha256(job.encode()).hexdigest()[:12]}"
    )
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
    mark, me = folder / READY, f"{os.getpid()}\n"
    if env.local_rank == 0:
        if _lives(folder / WRITER):
            raise ConfigError(
                f"{folder}: process {(folder / WRITER).read_text().strip()} writes there already; two ranks of this "
                f"machine have LOCAL_RANK 0, or two jobs meet at {env.master_host}:{env.master_port}. LOCAL_RANK "
                "counts from 0 on every machine, and each job has a MASTER_PORT of its own."
            )
        shutil.rmtree(folder, ignore_errors=True)  # of a job that met at the same place and was killed
        folder.mkdir(mode=0o700)
        (folder / WRITER).write_text(me)
        found = work(True)
        mark.write_text(me)
        return found
    until = time.monotonic() + PATIENCE_S
    while not _lives(mark):
        if time.monotonic() > until:
            raise ConfigError(
                f"{folder}: the first rank of this machine (LOCAL_RANK 0) has written no stand-ins for "
                f"{PATIENCE_S:.0f} s; rank {env.rank} has LOCAL_RANK {env.local_rank}. All ranks need the same "
                "MASTER_ADDR, MASTER_PORT and TMPDIR, and LOCAL_RANK counts from 0 on every machine."
            )
        time.sleep(0.05)
    return work(False)


def _lives(mark: Path) -> bool:
    """Whether the mark is there, and of a process that lives: one that was killed leaves its own behind."""
    try:
        os.kill(int(mark.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True
