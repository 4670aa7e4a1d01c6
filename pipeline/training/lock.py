"""One job at a time on an output folder: a lock file that names its holder, and is known to be stale when that is gone.

`<output>/.lock` holds host, process id and when the process started, in ticks since that machine booted: setting a
clock does not move them. On the same machine the process itself is looked for; from elsewhere (another machine, another
container) the file is watched, which its holder touches.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
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
"""A lock of elsewhere that nobody touched for so long counts as left behind."""
WATCH_S = 2.5 * BEAT_S
"""An old one is watched for so long all the same: its age goes by wall clocks, which may have been set."""
POLL_S = 1.0


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
            "started_ticks": _own_ticks(),
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
        seen: tuple[int, bytes] | None = None
        """What a holder elsewhere left when it was first looked at: time of change, contents."""
        began = until = time.monotonic()
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "r+b") as file:
                # Between reading and writing, of jobs that start at the same moment; freed with the descriptor.
                with contextlib.suppress(OSError):  # a file system without it
                    fcntl.flock(file, fcntl.LOCK_EX)
                data = file.read(1 << 16)
                now = (os.fstat(file.fileno()).st_mtime_ns, data)
                holder, living = self._judge(data) if data else ("", False)
                if living is None and seen is None:
                    seen, age = now, self._age()
                    until = began + min(STALE_S, max(STALE_S - age, WATCH_S))
                    print(
                        f"output: {self.path.parent} was in use by {holder}, not heard of for {age:.0f} s; waiting up "
                        f"to {until - began:.0f} s to see whether it lives.",
                        file=sys.stderr,
                    )
                waits = living is None and now == seen and time.monotonic() < until
                if living or (living is None and now != seen):
                    raise ConfigError(
                        f"output: {self.path.parent} is in use by another job ({holder}); wait for it or end it, or "
                        "choose another output."
                    )
                if not waits:
                    if data:
                        how = "which no longer runs" if living is False else "which did not touch it"
                        self.took_over = f"{self.path}: was left by {holder}, {how}; taken over."
                    file.seek(0)
                    file.truncate()
                    file.write(json.dumps(self._own).encode())
                    file.flush()
                    os.fsync(file.fileno())
                    return
            time.sleep(POLL_S)

    def _judge(self, data: bytes) -> tuple[str, bool | None]:
        """Who wrote `data`, and whether that process lives; None: it cannot be looked for from here."""
        try:
            held = parse_json(data)
            pid, started = int(held["pid"]), int(held["started_ticks"])
            holder = f"process {pid} on {str(held['host'])[:80]}, since {str(held['since'])[:40]}"
            here = bool(held["machine"]) and held["machine"] == self._own["machine"]
        except (ValueError, KeyError, TypeError):
            return "an unreadable holder", None
        return holder, _runs(pid, started) if here else None

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


def started_ticks(pid: int) -> int:
    """When a process of this machine began, in clock ticks since the machine booted; no setting of the clock moves it.

    Raises:
        OSError: there is no such process (FileNotFoundError, ProcessLookupError), or no Linux /proc.
    """
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[19])  # field 22; the second one, a name, may hold anything


def _runs(pid: int, started: int) -> bool:
    """Whether the process lives; another one may have been given its id since."""
    try:
        return started_ticks(pid) == started and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return False
    except (OSError, psutil.Error):
        return True


def _own_ticks() -> int:
    try:
        return started_ticks(os.getpid())
    except OSError:
        return 0  # without Linux' /proc no lock counts as this machine's either


@contextlib.contextmanager
def locked(folder: Path, wanted: bool) -> Iterator[OutputLock | None]:
    """The lock on the rank that takes it, None on the others."""
    if not wanted:
        yield None
        return
    with OutputLock(folder) as lock:
        yield lock
