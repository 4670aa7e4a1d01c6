"""SIGTERM and SIGUSR1 as a wish to stop in good order: noted here, acted on at a boundary all ranks share."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from parallel.world.rank_env import RankEnv

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What launchers and Slurm (`--signal=USR1@120`, preemption, time limit) send before they kill."""


class StopSignals:
    """Notes the signals while it is entered; outside they do what they did before (from the main thread only)."""

    def __init__(self) -> None:
        self.number = 0
        """The last signal that came; 0: none."""
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def signal_name(number: int) -> str:
    """SIGTERM, not 15."""
    return signal.Signals(number).name


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
