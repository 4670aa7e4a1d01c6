"""Commands of Python (`[sys.executable, "-m", MODULE, ...]`) as forks of a process that has imported everything.

A test that uses the fixture `forked` has `ForkedPopen` in the place of `subprocess.Popen`; what is forked has it, too,
so that a launcher forks its ranks. A fork is a process of its own: process id, parent, session, signals, exit code,
streams, variables, working folder, and what /proc shows. Different from a process that is started:

- Modules are imported already, with what they read of the variables then; modules that a launcher has changed, or
  values that it has cached, are changed for its ranks.
- Only `-u` and `-W` are known of Python's own options; commands with others, or without `-m`, are really started.
- A command that a test starts is the fork server's child, not the test's.

Tests of starting up itself (launch scripts, one rank of each launcher) do without.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import inspect
import os
import runpy
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from typing import Any, NoReturn

from tests.support.fork_server import die_with_server, fork_context, show_as

_POPEN = subprocess.Popen
_ARGUMENTS = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_STREAMS = ("p2cread", "c2pwrite", "errwrite")
_OTHERS = ("preexec_fn", "pass_fds", "shell", "gid", "gids", "uid")
"""Arguments of `subprocess.Popen` with which a command is really started."""
_FILTERS = tuple(warnings.filters)
_in_fork = False
"""This process is a fork itself, and so fit to be forked."""


@dataclass(frozen=True)
class Command:
    """A module to run, as `python OPTIONS -m MODULE ARGUMENTS`."""

    words: tuple[str, ...]
    """The whole command line."""
    module: str
    arguments: tuple[str, ...]
    warning_filters: tuple[str, ...]
    unbuffered: bool
    variables: dict[str, str]
    folder: str
    new_session: bool


def read_command(words: Sequence[Any]) -> tuple[str, tuple[str, ...], tuple[str, ...], bool] | None:
    """Module, its arguments, warning filters, and whether output is unbuffered; None: no command to fork."""
    if isinstance(words, str | bytes | os.PathLike) or not words or words[0] != sys.executable:
        return None
    rest, filters, unbuffered = list(map(str, words[1:])), list[str](), False
    while rest:
        word = rest.pop(0)
        if word == "-m" and rest:
            return rest[0], tuple(rest[1:]), tuple(filters), unbuffered
        if word == "-W" and rest:
            filters.append(rest.pop(0))
        elif word == "-u":
            unbuffered = True
        else:
            break
    return None


class ForkedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen`, which forks where it can: see the module."""

    _process: Any = None
    """multiprocessing's, of the fork server's child; None: a child of this process."""

    def _execute_child(self, *given: Any) -> None:
        asked = _ARGUMENTS.bind(self, *given).arguments
        found = read_command(asked["args"])
        if found is None or any(asked[name] for name in _OTHERS if asked[name] is not None) or asked["umask"] != -1:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        module, arguments, filters, unbuffered = found
        variables = dict(os.environ if asked["env"] is None else asked["env"])
        command = Command(
            words=tuple(map(str, asked["args"])),
            module=module,
            arguments=arguments,
            warning_filters=filters,
            unbuffered=unbuffered or bool(variables.get("PYTHONUNBUFFERED")),
            variables=variables,
            folder=os.path.abspath(asked["cwd"] or "."),
            new_session=asked["start_new_session"],
        )
        streams = [own if asked[name] == -1 else asked[name] for own, name in enumerate(_STREAMS)]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if _in_fork:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # a launcher's other threads
                self.pid = os.fork()
            if not self.pid:
                _leave_parent()
                _become(command, streams)
        else:
            context = fork_context()
            self._process = context.Process(target=_arrive, args=(_Passed(command, streams),))
            self._process.start()
            self.pid = self._process.pid
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            *(asked[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )

    def _internal_poll(self, *given: Any, **more: Any) -> int | None:
        if self._process is None:
            return super()._internal_poll(*given, **more)  # type: ignore[misc, no-any-return]
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._process is None:
            return super()._wait(timeout)  # type: ignore[misc, no-any-return]
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode


class _Passed:
    """A command and its streams, whose descriptors are passed on when this is pickled: while the process starts."""

    def __init__(self, command: Command, streams: list[int]) -> None:
        self.command, self.streams = command, streams

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.command, [DupFd(stream) for stream in self.streams])


def _received(command: Command, passed: list[Any]) -> tuple[Command, list[int]]:
    return command, [stream.detach() for stream in passed]


def _arrive(passed: tuple[Command, list[int]]) -> NoReturn:
    """In the fork server's child."""
    die_with_server()
    _become(*passed)


def _leave_parent() -> None:
    """In a launcher's child: forget what is the launcher's to do."""
    # Never collected: what holds a descriptor of the launcher's would close one of ours.
    gc.freeze()
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    for kept in (resource_tracker._resource_tracker, forkserver._forkserver):  # type: ignore[attr-defined]
        kept.__init__()


def _become(command: Command, streams: list[int]) -> NoReturn:
    """Run the command in this process, as a new interpreter would, and leave."""
    global _in_fork
    code = 70
    try:
        _in_fork = True
        # Above all three, lest one is overwritten before it was read.
        for target, stream in enumerate([fcntl.fcntl(stream, fcntl.F_DUPFD, 10) for stream in streams]):
            os.dup2(stream, target)
        os.closerange(3, 1 << 16)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(command.variables)
        show_as(command.words, command.variables)
        if command.new_session:
            os.setsid()
        os.chdir(command.folder)
        code = _run(command)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def become(words: Sequence[str]) -> NoReturn:
    """Go on as the command `python words...`, in a process that has imported everything and has one thread."""
    found = read_command([sys.executable, *words])
    if found is None:
        raise SystemExit(f"no command to become: {words}")
    module, arguments, filters, unbuffered = found
    command = Command(
        (sys.executable, *words), module, arguments, filters, unbuffered, dict(os.environ), os.getcwd(), False
    )
    _become(command, [0, 1, 2])


def _run(command: Command) -> int:
    """Exit code of the module, run as a program."""
    sys.stdin = open(0, closefd=False)
    sys.stdout.reconfigure(write_through=command.unbuffered)  # type: ignore[union-attr]
    warnings.filters[:] = _FILTERS  # type: ignore[index]
    for text in command.warning_filters:
        warnings.simplefilter(text)  # type: ignore[arg-type]
    for module in list(sys.modules.values()):  # torchrun's has the class under a name of its own
        if vars(module).get("Popen") is _POPEN:
            module.Popen = ForkedPopen  # type: ignore[attr-defined]
    sys.path[0] = command.folder
    sys.argv = [command.module, *command.arguments]
    sys.modules.pop(command.module, None)
    code, interrupted = 0, False
    try:
        runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int):
            code = end.code & 0xFF
        elif end.code is not None:
            print(end.code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if interrupted:
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code
