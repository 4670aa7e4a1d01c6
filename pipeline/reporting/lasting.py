"""What may fail without ending a run: the display, and files beside the training state. Told once, then gone on."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from rich.console import Console

Warn = Callable[[str], None]
"""Shows one sentence."""


def to_stderr(sentence: str) -> None:
    """Print a warning on standard error, if that can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """Why, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def optional_file(what: object, warn: Warn = to_stderr) -> Iterator[None]:
    """Within, a file that cannot be read or written is told and does not end the run.

    Args:
        what: its path, for the sentence.
    """
    try:
        yield
    except OSError as error:
        warn(f"{what}: cannot be written ({reason(error)}); training goes on without it.")


class LastingOutput:
    """Standard output that a closed terminal, a broken pipe or a full disk does not turn into an error.

    Args:
        stream: gives the stream of the moment; a live bar and tests replace `sys.stdout`.
    """

    def __init__(self, stream: Callable[[], IO[str]] = lambda: sys.stdout) -> None:
        self._stream, self._warned = stream, False

    @property
    def _file(self) -> IO[str]:
        file = self._stream()
        # A live bar puts a proxy in place of sys.stdout that would print through us again.
        return cast(IO[str], getattr(file, "rich_proxied_file", file))

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            return self._file.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._file.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":
            raise AttributeError(name)
        return getattr(self._file, name)

    def _failed(self, error: BaseException) -> None:
        if self._warned:
            return
        self._warned = True
        to_stderr(f"standard output cannot be written ({reason(error)}); training goes on, what it shows may be lost.")
        atexit.register(_leave_quietly)


def _leave_quietly() -> None:
    """Let the interpreter's own last flush, whose failure would become the exit code 120, succeed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_consoles: list[Console] = []


def lasting_console() -> Console:
    """The process's console on standard output, which never raises because that is gone."""
    if not _consoles:
        _consoles.append(Console(file=cast(IO[str], LastingOutput())))
    return _consoles[0]
