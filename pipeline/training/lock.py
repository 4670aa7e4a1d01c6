"""One job at a time on an output folder: a lock file that names its holder, and is known to be stale when that is gone.

`<output>/.lock` holds host, process id and the process's start time. On the same machine the process itself is looked
for; from elsewhere the file's age tells, which its holder keeps young.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from parallel.errors import ConfigError
from parallel.health.liveness import machine
from pipeline.storage.durable import Damaged, parse_json, read_small

NAME = ".lock"
BEAT_S = 15.0
"""Seconds between two touches by the holder."""
STALE_S = 120.0
"""Age at which a lock of another machine counts as left behind."""


class OutputLock:
    """Holds the lock of an output folder; a context manager.

    Args:
        folder: the output folder; made if it is not there.

    Raises:
        ConfigError: a living job holds it (named), or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.took_over: str | None = None
        """A sentence on the stale lock that was found, if one was."""
        self._own = {
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written ({error}); free space or fix permissions, or choose another output "
                "folder."
            ) from None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="output-lock", daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "r+b") as file:
            # Between reading and writing, of jobs that start at the same moment; freed with the descriptor.
            with contextlib.suppress(OSError):  # a file system without it
                fcntl.flock(file, fcntl.LOCK_EX)
            data = file.read(1 << 16)
            if data:
                self._judge(data)
            file.seek(0)
            file.truncate()
            file.write(json.dumps(self._own).encode())
            file.flush()
            os.fsync(file.fileno())

    def _judge(self, data: bytes) -> None:
        """Raise if whoever wrote `data` still lives; note it otherwise."""
        try:
            held = parse_json(data)
            host, pid, started, since = (held[key] for key in ("host", "pid", "process_started", "since"))
            told = f"process {int(pid)} on {str(host)[:80]}, since {str(since)[:40]}"
            here = bool(held["machine"]) and held["machine"] == self._own["machine"]
            started = float(started)
        except (ValueError, KeyError, TypeError):
            held, here, told = {}, False, "an unreadable holder"
        age = self._age()
        living = _runs(int(held["pid"]), started) if here else age < STALE_S
        if living:
            mend = "wait for it or end it" if here else f"wait for it, or {STALE_S:.0f} s if it is gone"
            raise ConfigError(
                f"output: {self.path.parent} is in use by another job ({told}); {mend}, or choose another output."
            )
        how = "which no longer runs" if here else f"not heard of for {age:.0f} s"
        self.took_over = f"{self.path}: was left by {told}, {how}; taken over."

    def _age(self) -> float:
        """Seconds since the lock was touched, by the clock of the file system, which may not be ours."""
        probe = self.path.with_name(f"{NAME}-probe-{os.getpid()}")
        try:
            probe.touch(0o600)
            return max(0.0, probe.stat().st_mtime - self.path.stat().st_mtime)
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError, ConfigError):  # the disk may come back; a publish would notice
                self.check()
                os.utime(self.path)

    def check(self) -> None:
        """Raise ConfigError unless the lock is still this process's: it may have been stopped and given up for dead."""
        try:
            held: Any = parse_json(read_small(self.path))
        except (Damaged, ValueError):
            held = None
        if held != self._own:
            raise ConfigError(
                f"{self.path}: is no longer this job's: another one took the output folder over, or it was removed; "
                "let only one job run there."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(ConfigError, OSError):
            self.check()
            self.path.unlink()


def _runs(pid: int, started: float) -> bool:
    """Whether the process lives; another one may have been given its id since."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


@contextlib.contextmanager
def locked(folder: Path, wanted: bool) -> Iterator[OutputLock | None]:
    """The lock on the rank that takes it, None on the others."""
    if not wanted:
        yield None
        return
    with OutputLock(folder) as lock:
        yield lock
