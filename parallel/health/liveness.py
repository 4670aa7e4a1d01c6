"""What ranks tell each other of their state, and what follows from it; threads and sockets are in `watch`.

A rank's beat says how long its main thread has stood still and where. From everybody's beats any rank concludes who
died, who fell silent and who hangs, and says so in one sentence.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import re
import signal
import socket
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch

from parallel.health.verdict import Verdict, at_step

SILENCE_S = 30.0
"""Seconds without a beat after which a process on another machine counts as lost: longer than a library may hold
Python's lock inside a training step. (On the same machine the process itself is looked at, and none is waited for.)"""
PATIENCE = 6
"""A phase declared long (loading, evaluation, saving) may stand still for so many times the time-out."""
SIGNAL_S = 2.0
"""Seconds after a rank was ended by a signal in which the reason may be told, if there is another."""
SHOWN_RANKS = 8
"""Ranks a sentence names one by one."""

AHEAD = 3
"""Moves (layers) that tell a rank which runs ahead from one that holds it up: a GPU's queue holds a dozen layers."""

# Code that only ever stands still because a peer does: torch's collectives, ours, meetings of all ranks, and megatron's
# pipeline exchanges.
_WAITING_FILES = (
    "torch/distributed/",
    *(f"parallel/world/{name}.py" for name in ("agreement", "collectives", "meeting")),
    "pipeline_parallel/p2p_communication.py",
)
# Lines on which a GPU program waits for its device, and so for the collectives queued there.
_DEVICE_WAIT = re.compile(r"\b(wait|synchronize|item|tolist|cpu|barrier|float|int|bool)\(")
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), "<frozen")


@dataclass(frozen=True)
class Beat:
    """One rank's state."""

    rank: int
    count: int
    """Beats so far: a number that does not rise is a rank that has fallen silent."""
    step: int = 0
    """Optimizer step in progress, counted from 1; 0 before the first."""
    phase: str = "starting"
    idle_s: float = 0.0
    """Seconds since the main thread last made progress."""
    patient: bool = False
    """The phase may take long."""
    waiting: bool = False
    """The main thread stands in a collective (or waits for a device that does)."""
    where: str = ""
    """`file:line in function` of the main thread."""
    moves: int = 0
    """Signs of progress of the main thread within its step and phase."""
    line: int = 0
    """Ranks of the same number do the same things in the same order: a pipeline stage."""
    host: str = ""
    """Same text, same machine and process table; empty: process ids say nothing."""
    pid: int = 0
    ended: bool = False
    """Left in good order: its absence means nothing."""
    signal: int = 0
    """What ended it before it had anything to save, or after: SIGTERM or SIGUSR1; 0: none did."""

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Beat:
        """From JSON."""
        return cls(**json.loads(text))


def machine() -> str:
    """Names this machine's process table (boot and process-id namespace); empty where Linux' /proc is not to be had."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _short(file: str) -> str:
    """A path a reader can place: its last three parts."""
    return "/".join(Path(file).parts[-3:])


def _is_library(file: str) -> bool:
    return file.startswith(tuple(path for path in _LIBRARIES if path))


def stands(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack only waits for a peer, and `file:line in function` of its innermost line outside libraries."""
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    if not stack:
        return False, "an unknown place"
    own = next((i for i, item in enumerate(stack) if not _is_library(item.f_code.co_filename)), len(stack) - 1)
    at = stack[own]
    waiting = any(
        name in item.f_code.co_filename.replace("\\", "/") for item in stack[: own + 1] for name in _WAITING_FILES
    )
    if not waiting and torch.cuda.is_available() and torch.cuda.is_initialized():
        waiting = bool(_DEVICE_WAIT.search(linecache.getline(at.f_code.co_filename, at.f_lineno)))
    return waiting, f"{_short(at.f_code.co_filename)}:{at.f_lineno} in {at.f_code.co_name}"


def main_thread_stands(ident: int) -> tuple[bool, str]:
    """`stands` of the thread `ident`; in a backward pass also of the threads autograd runs on a device's behalf."""
    frames = sys._current_frames()
    waiting, where = stands(frames.get(ident))
    frame = frames.get(ident)
    if not waiting and frame is not None and frame.f_code.co_name == "_engine_run_backward":
        for other, stack in frames.items():
            collective = any(_WAITING_FILES[0] in entry.filename for entry in traceback.extract_stack(stack, limit=8))
            waiting |= other != ident and collective
    return waiting, where


class Peers:
    """The newest beat of every rank, and what follows from all of them.

    Args:
        rank, world: this rank among how many.
        now: monotonic seconds; every later `now` is of the same clock.
        host: `machine()` here.
    """

    def __init__(self, rank: int, world: int, now: float, host: str = "") -> None:
        self.rank, self.world, self.host, self.began = rank, world, host, now
        self.beats: dict[int, Beat] = {}
        self.seen: dict[int, float] = {}
        self._processes: dict[int, psutil.Process | None] = {}

    def update(self, beat: Beat, now: float) -> None:
        """Take in a beat; only a higher count is a sign of life."""
        old = self.beats.get(beat.rank)
        if old is None or beat.count > old.count:
            self.beats[beat.rank], self.seen[beat.rank] = beat, now

    @property
    def missing(self) -> list[int]:
        """Ranks that have not been heard of yet."""
        return [rank for rank in range(self.world) if rank not in self.beats]

    def running(self) -> list[Beat]:
        """Beats of those heard of that have not left in good order."""
        return [self.beats[rank] for rank in sorted(self.beats) if not self.beats[rank].ended]

    def local(self, beat: Beat) -> bool:
        """Whether its process id means something here."""
        return bool(self.host) and beat.host == self.host

    def _process(self, beat: Beat) -> psutil.Process | None:
        """Its process on this machine, as first seen; None: there is none any more."""
        if beat.rank not in self._processes:
            try:
                self._processes[beat.rank] = psutil.Process(beat.pid)
            except psutil.Error:
                self._processes[beat.rank] = None
        return self._processes[beat.rank]

    def gone(self, beat: Beat) -> bool:
        """Whether its process, on this machine, no longer runs."""
        if not self.local(beat) or beat.rank == self.rank:
            return False
        process = self._process(beat)
        try:
            # is_running compares the start time as well: the id may have been given to another process.
            return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def stopped(self) -> list[Beat]:
        """Beats of the ranks whose process, on this machine, is stopped (SIGSTOP, a debugger)."""
        found = []
        for beat in self.running():
            if self.local(beat) and beat.rank != self.rank:
                with contextlib.suppress(psutil.Error):
                    process = self._process(beat)
                    if process is not None and process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                        found.append(beat)
        return found

    def wake_stopped(self) -> None:
        """Let those go on, once the verdict is known: a stopped process hears neither it nor a launcher's SIGTERM."""
        for beat in self.stopped():
            with contextlib.suppress(psutil.Error):
                process = self._process(beat)
                if process is not None:
                    process.resume()

    def idle_s(self, beat: Beat, now: float) -> float:
        """Seconds without progress, the silence since the beat included."""
        return beat.idle_s + (now - self.seen[beat.rank])

    def judge(self, now: float, timeout_s: float, silence_s: float = SILENCE_S) -> Verdict | None:
        """Who died, fell silent or hangs; None: nobody, as far as is known.

        Args:
            now: see the constructor.
            timeout_s: seconds without progress on every rank that make a hang.
            silence_s: seconds without a beat that make a loss, in a phase that is not declared long.
        """
        running = self.running()
        for beat in self.beats.values():
            # A launcher ends its processes so, too, when another has failed: that is soon told, and comes first.
            if beat.signal and now - self.seen[beat.rank] > SIGNAL_S:
                return self.signaled(beat)
        for beat in running:
            if self.gone(beat):
                return self._died(beat, "its process is gone: killed, for want of memory perhaps, or crashed")
        for beat in running:
            silent = now - self.seen[beat.rank]
            limit = max(silence_s, timeout_s) if beat.patient else silence_s
            if silent > limit and not self.local(beat):
                return self._died(beat, f"no sign of life for {silent:.0f} s: killed, or its machine is down")
        if self.missing and now - self.began > timeout_s:
            absent = self.missing
            return Verdict(
                absent[0],
                f"{_ranks(absent)} never came up: not heard of in {now - self.began:.0f} s, while {len(running)} of "
                f"{self.world} ranks wait; look at what {_it(absent)} printed, and at the machine",
            )
        return None if self.missing else self._hung(running, now, timeout_s)

    def signaled(self, beat: Beat) -> Verdict:
        """A machine of several was told to stop, and the others cannot go on without it."""
        name, place = signal.Signals(beat.signal).name, at_step(beat.step, beat.phase)
        text = (
            f"rank {beat.rank} was ended by {name} {place}, and the others cannot go on without it: nothing was to be "
            "saved; rerun the same command to go on"
        )
        return Verdict(beat.rank, text, 128 + beat.signal)

    def _died(self, beat: Beat, how: str) -> Verdict:
        # In lockstep nobody is ahead of the dead rank, and what it last said of itself may be half a second old.
        last = max(beat, self.beats.get(self.rank, beat), key=lambda b: b.step)
        return Verdict(beat.rank, f"rank {beat.rank} died {at_step(last.step, last.phase)} ({how})")

    def _hung(self, running: Sequence[Beat], now: float, timeout_s: float) -> Verdict | None:
        """Nobody moves any more: name those that do not merely wait for the others."""
        limits = {beat.rank: timeout_s * (PATIENCE if beat.patient else 1) for beat in running}
        if not running or any(self.idle_s(beat, now) <= limits[beat.rank] for beat in running):
            return None
        idle = max(self.idle_s(beat, now) for beat in running)
        # A stopped process may have been stopped while it waited: its last word is not to be trusted.
        stopped = self.stopped()
        guilty = stopped or behind(
            [beat for beat in running if not beat.waiting or now - self.seen[beat.rank] > SILENCE_S]
        )
        if not guilty:
            places = "; ".join(f"rank {beat.rank} in {beat.where}" for beat in running[:SHOWN_RANKS])
            return Verdict(
                -1,
                f"all {len(running)} ranks wait for each other {at_step(running[0].step, running[0].phase)}: no "
                f"progress for {idle:.0f} s; {places}; raise parallel.timeout_s if a step takes so long",
            )
        places = "; ".join(
            (f"rank {beat.rank} " if len(guilty) > 1 else "it ")
            + ("is stopped (SIGSTOP, or a debugger)" if beat in stopped else self._stands(beat, now))
            for beat in guilty[:SHOWN_RANKS]
        )
        # What a stopped rank last said may be half a second old, and in lockstep nobody is ahead of it.
        first = max(running, key=lambda beat: beat.step) if stopped else guilty[0]
        verb = "hangs" if len(guilty) == 1 else "hang"
        if len(guilty) > 1 and torch.cuda.is_available():
            places += "; one that waits for its GPU's full queue may be among them"
        return Verdict(
            guilty[0].rank,
            f"{_ranks([beat.rank for beat in guilty])} {verb} {at_step(first.step, first.phase)}: no progress for "
            f"{idle:.0f} s; {places}; raise parallel.timeout_s if that may take so long",
        )

    def _stands(self, beat: Beat, now: float) -> str:
        silent = now - self.seen[beat.rank]
        if silent > SILENCE_S:
            return f"is stopped, or in code that holds Python's lock: no sign of life for {silent:.0f} s"
        return f"stands at {beat.where}"


def behind(beats: Sequence[Beat]) -> list[Beat]:
    """Those that others of their line, in training, are well ahead of; all of them, if nobody is ahead.

    A GPU takes launches in advance. So a rank whose peer hangs runs ahead until its queue is full, and then stands in
    whatever launch comes next: its stack does not tell that it waits, its being ahead does.
    """
    found = [
        beat
        for beat in beats
        if any(
            (other.line, other.phase) == (beat.line, "training")
            and (other.step, other.moves - AHEAD) >= (beat.step, beat.moves)
            for other in beats
        )
    ]
    return found or list(beats)


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 1, 2`."""
    shown = ", ".join(str(rank) for rank in ranks[:SHOWN_RANKS])
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _it(ranks: Sequence[int]) -> str:
    return "they" if len(ranks) > 1 else "it"
