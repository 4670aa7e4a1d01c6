"""SIGTERM, SIGUSR1 and Ctrl-C as a wish to stop in good order: noted here, acted on at a boundary all ranks share."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import psutil

from parallel.world.rank_env import RankEnv

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What launchers and Slurm (`--signal=USR1@120`, preemption, time limit) send before they kill, and Ctrl-C."""
INTERRUPT_CODE = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as a shell's."""
SAVING = "Ctrl-C: stopping at the next boundary, and saving; once more ends it at once, as of the last save."
AT_ONCE = "Ctrl-C twice: ended at once, as of the last save; rerun the same command to go on from there."


class StopSignals:
    """Notes the signals while it is entered; outside they do what they did before (from the main thread only).

    A second Ctrl-C does not wait for the boundary: it ends this process where it stands.

    Args:
        speaks: whether this process tells what Ctrl-C does; no launcher does it, and it is the one to.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.number = 0
        """The last signal that came; 0: none."""
        self._speaks, self._interrupts = speaks, 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._speaks:
                tell(SAVING if self._interrupts == 1 else AT_ONCE)
            if self._interrupts > 1:
                end_at_once(INTERRUPT_CODE)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # What nohup or a shell's `&` made deaf to Ctrl-C stays so.
            deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            heard = [number for number in SIGNALS if not (deaf and number == signal.SIGINT)]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def tell(text: str) -> None:
    """One line on standard error, in one write, past Python's streams: a display may hold their locks."""
    # A live display stands in the middle of a line, and may have hidden the cursor.
    show = "\r\n\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{show}{text}\n".encode(errors="replace"))


def end_at_once(code: int) -> NoReturn:
    """End this process and its children without another line of Python."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(code)


def stop_name(number: int) -> str:
    """SIGTERM, not 15; and what a user calls SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def exit_code(wanted: int, env: RankEnv) -> int:
    """What this process of a stopped job leaves with: `wanted`, or 0 once the launcher has been told of it."""
    if not env.exit_file:
        return wanted
    if env.local_rank == 0:  # each machine has a launcher
        try:
            Path(env.exit_file).write_text(str(wanted))
        except OSError:
            return wanted  # what was saved is saved
    return 0
