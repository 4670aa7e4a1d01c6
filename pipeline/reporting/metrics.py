"""One JSON line and one set of TensorBoard points an optimizer step, kept free of duplicates across resumes."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.tensorboard import SummaryWriter

from parallel.errors import DataError

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

    Args:
        folder: the run's output folder; made if missing.
        resume_step: optimizer steps already done; 0 starts over.

    Raises:
        DataError: the existing file has a damaged line before its last.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            temporary = self.path.with_name(f".{METRICS_FILE}.tmp")
            temporary.write_text("".join(map(_dump, kept)))
            temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        # TensorBoard hides events at or after the purge step that were written before it.
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=resume_step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step; it is on its way to the disk when this returns.

        Raises:
            KeyError: one of FIELDS is missing.
        """
        ordered = {field: row[field] for field in FIELDS} | dict(row)
        self._file.write(_dump(ordered))
        self._file.flush()
        for field, value in ordered.items():
            if field != "step":
                self._board.add_scalar(f"train/{field}", value, ordered["step"])

    def write_perplexity(self, step: int, by_length: Mapping[int, float]) -> None:
        """Add an evaluation's perplexities (by context length, tokens) to TensorBoard."""
        for length, perplexity in by_length.items():
            self._board.add_scalar(f"perplexity/{length}", perplexity, step)
        self._board.flush()

    def close(self) -> None:
        """Flush and close both; safe to call twice."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
