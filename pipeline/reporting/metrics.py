"""One JSON line and one set of TensorBoard points an optimizer step, kept free of duplicates across resumes."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.tensorboard import SummaryWriter

from parallel.errors import DataError
from pipeline.reporting.lasting import Warn, reason, to_stderr
from pipeline.reporting.trackers import Trackers

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

FIELDS = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "memory_gib", "skipped")
"""What every line holds: 1-based step; mean loss, nats a token; gradient norm before clipping; rate of the adapters;
tokens of the step and a second, over all ranks; seconds of the step; peak memory of rank 0, GiB; steps skipped yet."""


def peak_memory_gib() -> float:
    """Most memory this process has held, GiB: allocated on its CUDA device, or resident in RAM without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would report the parent's peak when that was higher at the fork.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def json_number(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it (NaN, infinities)."""
    return value if value is not None and math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file, in order; null reads as NaN, a torn last line (a killed run's) is left out.

    Raises:
        DataError: the file is missing, or a line other than the last is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name the output folder of a run.") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError("step is no integer")
        except (ValueError, KeyError, TypeError):
            if number == len(lines):  # no newline follows it: it was being written
                break
            raise DataError(f"{path} line {number}: is not a step's metrics; remove that line.") from None
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def _dump(row: Mapping[str, Any]) -> str:
    """One JSON line, newline included."""
    safe = {key: json_number(value) if isinstance(value, float) else value for key, value in row.items()}
    return json.dumps(safe, allow_nan=False) + "\n"


class MetricsWriter:
    """Writes `<folder>/metrics.jsonl` and `<folder>/tensorboard/`; for rank 0.

    Lines and points after `resume_step` are dropped at the start, since the resumed run computes those steps again.
    No failure to write ends a run: it is told once, lines wait in memory until the file can be written again, and
    TensorBoard's points are given up.

    Args:
        folder: the run's output folder; made if missing.
        resume_step: optimizer steps already done; 0 starts over.
        warn: shows a sentence.
        trackers: get every step too; closed with this.

    Raises:
        DataError: the existing file has a damaged line before its last.
    """

    def __init__(
        self, folder: Path, resume_step: int, warn: Warn = to_stderr, trackers: Trackers | None = None
    ) -> None:
        self._trackers = trackers
        self.path, self._warn, self._warned = folder / METRICS_FILE, warn, False
        self._handle: int | None = None
        self._size = 0
        """Bytes of whole lines in the file."""
        kept = read_metrics(self.path) if self.path.exists() else []
        self._waiting = "".join(_dump(row) for row in kept if row["step"] <= resume_step).encode()
        self._flush()
        self._board: SummaryWriter | None = None
        try:
            # TensorBoard hides events at or after the purge step that were written before it.
            self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=resume_step + 1)
        except OSError as error:
            self._warn(f"{folder / TENSORBOARD_FOLDER}: cannot be written ({reason(error)}); training goes on.")

    def _flush(self) -> None:
        """Write what waits; what the disk refuses waits on."""
        try:
            if self._handle is None:  # the first lines replace an earlier process's file
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.path.with_name(f".{METRICS_FILE}.tmp")
                temporary.unlink(missing_ok=True)
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                try:
                    self._append(handle)
                    os.replace(temporary, self.path)
                except OSError:
                    os.close(handle)
                    raise
                self._handle = handle
            else:
                self._append(self._handle)
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(
                    f"{self.path}: cannot be written ({reason(error)}); training goes on, and it is tried again."
                )
            return
        self._size += len(self._waiting)
        self._waiting = b""

    def _append(self, handle: int) -> None:
        """Put what waits behind the whole lines, over the torn one that a refused attempt may have left."""
        done = 0
        while done < len(self._waiting):
            done += os.pwrite(handle, self._waiting[done:], self._size + done)

    def _draw(self, action: Callable[[SummaryWriter], None]) -> None:
        if self._board is None:
            return
        try:
            action(self._board)
        except (OSError, ValueError) as error:
            # Its writing thread has died: it takes no more points, and closing it would fail too.
            self._board = None
            self._warn(
                f"{self.path.with_name(TENSORBOARD_FOLDER)}: cannot be written ({reason(error)}); training goes on, "
                "without further points there."
            )

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step; it is on its way to the disk when this returns, unless that refuses.

        Raises:
            KeyError: one of FIELDS is missing.
        """
        ordered = {field: row[field] for field in FIELDS} | dict(row)
        self._waiting += _dump(ordered).encode()
        self._flush()

        def points(board: SummaryWriter) -> None:
            for field, value in ordered.items():
                if field != "step":
                    board.add_scalar(f"train/{field}", value, ordered["step"])

        self._draw(points)
        self._track({f"train/{field}": value for field, value in ordered.items() if field != "step"}, ordered["step"])

    def _track(self, values: Mapping[str, Any], step: int) -> None:
        if self._trackers is not None:
            self._trackers.log(values, step)

    def write_evaluation(self, step: int, points: Mapping[str, float]) -> None:
        """Add an evaluation's figures, by name, to TensorBoard."""

        def add(board: SummaryWriter) -> None:
            for name, value in points.items():
                board.add_scalar(name, value, step)
            board.flush()

        self._draw(add)
        self._track(points, step)

    def close(self) -> None:
        """Flush and close both; safe to call twice."""
        if self._waiting:
            self._flush()
        if self._waiting:
            self._warn(f"{self.path}: lacks the last {self._waiting.count(b'\n')} lines; the disk refused them.")
            self._waiting = b""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._draw(SummaryWriter.close)
        if self._trackers is not None:
            self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
