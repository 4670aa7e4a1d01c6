"""How every command ends: with an exit code that means the same everywhere, one line of what was wrong, no traceback.

0: done; 1: what was asked for turned out wrong (a check that fails, no memory left); 2: a sentence you can mend; 130:
Ctrl-C. A traceback is a fault of this program's. No torch.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import pwd
import select
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from parallel.errors import LongspanError

FAILED = 1
TOLD = 2
INTERRUPTED = 130
"""128 + SIGINT, as of a shell."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a write may raise without naming the file."""


class Main(Protocol):
    """Takes the arguments (None: the process's) and returns an exit code."""

    def __call__(self, arguments: Sequence[str] | None = None, /) -> int:
        """Work."""
        ...


def command(main: Main) -> Main:
    """Make `main` return an exit code whatever happens, but for faults of this program's, which it raises.

    Args:
        main: may raise LongspanError.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None, /) -> int:
        try:
            code = main(arguments)
            sys.stdout.flush()  # not at the interpreter's end, where a closed pipe is a traceback
            return code
        except KeyboardInterrupt:
            say("interrupted.")
            return INTERRUPTED
        except BrokenPipeError:
            if not _output_closed():
                raise
            return FAILED
        except Exception as error:
            known = sentence(error)
            if known is None:
                raise
            say(f"error: {known[0]}")
            return known[1]

    return run


def sentence(error: Exception) -> tuple[str, int] | None:
    """What to say of an error, and the exit code; None: it is a fault of this program's."""
    if isinstance(error, LongspanError):
        return str(error), TOLD
    if isinstance(error, OSError) and isinstance(error.filename, (str, os.PathLike)):
        return f"{error.filename}: cannot be used ({error.strerror}); mend it, or give another path.", TOLD
    if isinstance(error, OSError) and error.errno in FULL:
        return f"A file could not be written ({error.strerror}); free space, or give another path.", TOLD
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"Out of GPU memory: {str(error).splitlines()[0]}", FAILED
    return None


def say(text: str) -> None:
    """One line on standard error, if anybody still reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def _output_closed() -> bool:
    """Whether nobody reads standard output any more; if so, what is still to be written goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False  # a stand-in without one
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


DISPATCHER = "longspan"
"""Its first word; the second is the command."""


def program(module: str) -> str:
    """How the user called this command, for its usage line."""
    called = sys.argv[0] if sys.argv else ""
    return called if called.startswith(f"{DISPATCHER} ") else f"python -m {module}"


def starting() -> None:
    """Called by the packages that hold commands, when `python -m` imports them: before seconds of other imports."""
    if sys.argv[:1] == ["-m"]:
        begin()


def begin() -> None:
    """What every command needs before it imports anything heavy."""
    sys.excepthook = _quiet
    # "No CUDA runtime is found, using CUDA_HOME", said by torch on a CPU before a sentence of ours.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        # A container's --user: torch asks for a name to call its caches by, and fails where there is none.
        os.environ.setdefault("LOGNAME", f"uid-{os.getuid()}")


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say("interrupted.")
    else:
        sys.__excepthook__(kind, error, trace)
