"""The live display of a run: a rich progress bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

from pipeline.reporting.lasting import lasting_console
from pipeline.reporting.phases import waits
from pipeline.reporting.words import counted


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _live_display(console: Console, transient: bool) -> RichProgress | None:
    """A bar with a column of facts, or None where the output is no terminal (CI, Slurm)."""
    if not console.is_terminal:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return RichProgress(
        *columns, TextColumn("{task.fields[facts]}", markup=False), console=console, transient=transient
    )


def _say(console: Console, text: str) -> None:
    """Print one line as it is, unwrapped; it appears above a live bar."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Display:
    """A bar, if there is one, shown while it is entered."""

    _live: RichProgress | None = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


class TrainProgress(_Display):
    """Shows training; a context manager.

    Args:
        total: optimizer steps of the whole run.
        start: steps done before this process began.
        enabled: False shows nothing (every rank but 0).
        every: steps between lines when the output is not a terminal; the first and last step always print.
        console: where to write; None is standard output.
        clock: seconds.
    """

    WITHIN_S = 60.0
    """Seconds between lines of one step."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        enabled: bool = True,
        every: int = 10,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.start, self.enabled, self.every = total, start, enabled, max(every, 1)
        self._console = console or lasting_console()
        self._seconds, self._last = 0.0, ""
        self._clock, self._shown_at = clock, clock()
        self._task: TaskID | None = None
        self._live = _live_display(self._console, transient=False) if enabled else None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            _say(self._console, text)

    def within(self, step: int, done: int, total: int) -> None:
        """Show how far a step under way is; a line in a log once a minute, since most steps take less.

        Args:
            step: the step, counting from 1.
            done: passes over micro-batches or chunks.
            total: of the whole step.
        """
        if not self.enabled:
            return
        if self._live is not None:
            self._live.update(self._shown(self._live), facts=f"step {step}: {done / total:.0%}  {self._last}")
        elif (now := self._clock()) - self._shown_at >= self.WITHIN_S:
            self._shown_at = now
            self.say(f"step {step}/{self.total}  {done} of {total} passes done")

    def _shown(self, live: RichProgress) -> TaskID:
        if self._task is None:
            self._task = live.add_task("training", total=self.total, facts="")
        return self._task

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a finished optimizer step.

        Args:
            step: steps done, counting from 1.
            metrics: a line of `metrics.FIELDS`.
        """
        if not self.enabled:
            return
        # Summed from the steps themselves: evaluations and checkpoints in between must not stretch the estimate.
        self._seconds += metrics["seconds"]
        facts = self._last = self._facts(step, metrics)
        self._shown_at = self._clock()
        if self._live is not None:
            self._live.update(self._shown(self._live), completed=step, facts=facts)
        elif step in (self.start + 1, self.total) or step % self.every == 0:
            self.say(f"step {step}/{self.total}  {facts}")

    def _facts(self, step: int, metrics: Mapping[str, Any]) -> str:
        left = self._seconds / max(step - self.start, 1) * (self.total - step)
        facts = [
            f"loss {metrics['loss']:.4f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            *([f"MFU {metrics['mfu']:.0%}"] if "mfu" in metrics else ()),
            f"{metrics['memory_gib']:.2f} GiB",
            f"{duration(left)} left",
        ]
        if waited := waits(metrics):
            facts.append(f"waits: {waited}")
        if metrics.get("skipped"):
            facts.append(f"{metrics['skipped']} skipped")
        if metrics.get("saving") is not None:
            facts.append(f"saving {metrics['saving']:.0%}")
        return "  ".join(facts)


class EvalProgress(_Display):
    """Shows one evaluation, alone or while `TrainProgress` is live; a context manager.

    Args:
        windows: windows this rank will evaluate.
        label: what is evaluated, e.g. "perplexity before training".
        enabled, console, clock: as for `TrainProgress`.
    """

    def __init__(
        self,
        windows: int,
        label: str = "evaluation",
        *,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.windows, self.label, self.enabled, self.done = windows, label, enabled, 0
        self._console = console or lasting_console()
        self._clock = clock
        self._began = clock()
        self._live = _live_display(self._console, transient=True) if enabled else None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._live is not None:
            self._task = self._live.add_task(self.label, total=self.windows, facts="")
        return super().__enter__()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            _say(self._console, text)

    def advance(self, windows: int = 1) -> None:
        """Count finished windows."""
        self.done += windows
        if self._live is not None and self._task is not None and self.done:
            spent = self._clock() - self._began
            left = spent / self.done * (self.windows - self.done)
            self._live.update(self._task, completed=self.done, facts=f"{duration(left)} left")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self.enabled and error is None:
            _say(
                self._console,
                f"{self.label}: {counted(self.done, 'window')} in {duration(self._clock() - self._began)}",
            )


class ByteProgress(_Display):
    """Shows a conversion by bytes: a bar with rate and time left on a terminal, at most a line a minute elsewhere.

    Args:
        total: bytes to be written.
        label: what is done, e.g. "import".
        enabled, console, clock: as for `TrainProgress`.
    """

    EVERY_S = 60.0
    """Seconds between lines: a short conversion has none in a log, where its result says all."""

    def __init__(
        self,
        total: int,
        label: str,
        *,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.enabled, self.done = total, label, enabled, 0
        self._clock, self._shown_at = clock, clock()
        self._console = console or lasting_console()
        self._live: RichProgress | None = None
        if enabled and self._console.is_terminal:
            columns = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
            self._live = RichProgress(
                TextColumn("{task.description}"), BarColumn(), *columns, console=self._console, transient=True
            )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._task = self._live.add_task(self.label, total=self.total)
        return super().__enter__()

    def advance(self, count: int, note: str | None = None) -> None:
        """Count finished bytes, and say `note`."""
        self.done += count
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self.done)
        if note is not None:
            self._line(note)

    def say(self, text: str) -> None:
        """Print a line where there is no bar, unless there was one just now."""
        if self._clock() - self._shown_at >= self.EVERY_S:
            self._shown_at = self._clock()
            self._line(text)

    def _line(self, text: str) -> None:
        """With how far it is."""
        if self.enabled and self._live is None:
            _say(self._console, f"{self.label}: {text} ({self.done / 2**30:.2f} of {self.total / 2**30:.2f} GiB)")


class TokenProgress(_Display):
    """Shows text becoming tokens: a bar on a terminal, a line every ten seconds elsewhere; a context manager.

    Args:
        enabled, console, clock: as for `EvalProgress`.
        touch: called whenever there is progress.
    """

    EVERY_S = 10.0
    """Seconds between lines."""

    def __init__(
        self,
        *,
        enabled: bool = True,
        console: Console | None = None,
        touch: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.calls = 0
        """Times progress was told; 0: nothing had to be done."""
        self._console, self._touch, self._clock, self._enabled = console or lasting_console(), touch, clock, enabled
        self._shown_at = clock()
        self._live: RichProgress | None = None
        self._task: TaskID | None = None
        if enabled and self._console.is_terminal:
            columns = (TaskProgressColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn())
            self._live = RichProgress(
                TextColumn("tokenizing"), BarColumn(), *columns, console=self._console, transient=True
            )

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """See `pipeline.data.prepare.Progress`."""
        self.calls += 1
        self._touch()
        if self._live is not None:
            if self._task is None:
                self._live.start()
                self._task = self._live.add_task("", total=total, tokens=0)
            self._live.update(self._task, completed=done, total=total, tokens=tokens)
        elif self._enabled and self._clock() - self._shown_at >= self.EVERY_S:
            self._shown_at = self._clock()
            _say(self._console, f"tokenizing: {done / max(total, 1):.0%}, {tokens:,} tokens")
