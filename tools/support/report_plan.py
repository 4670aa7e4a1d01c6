"""What was planned of a run, beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from pipeline.planner.auto import RECORD
from pipeline.planning.memory import GIB
from pipeline.storage.json_file import read_object

LEAST_ROWS = 2
"""Steps that must have been measured: a process's first pays for its warm-up."""


def planned_lines(
    folder: Path, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, list[list[str]], list[list[str]]] | None:
    """The layout's name; [quantity, planned, measured, off by]; [part of a step or of memory, planned].

    Args:
        folder: a run's.
        rows: of its metrics, a step each.

    Returns:
        None where nothing was planned, or the record is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_object(path)
        parts: Mapping[str, float] = record["seconds"]
        memory: Mapping[str, float] = record["memory"]
        name, seconds, allocated = str(record["name"]), float(sum(parts.values())), float(record["allocated"]) / GIB
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return None
    compared = []
    times = [row["seconds"] for row in rows[1:]]
    if len(rows) >= LEAST_ROWS:
        compared.append(_line("seconds a step, median", seconds, statistics.median(times)))
    peak = max((row["memory_gib"] for row in rows), default=0.0)
    if peak:
        compared.append(_line("peak GiB allocated, rank 0", allocated, peak))
    details = [[f"step: {part}", f"{value:.3g} s"] for part, value in parts.items()]
    details += [[f"memory: {kind}", f"{size / GIB:.2f} GiB"] for kind, size in memory.items() if size]
    return name, compared, details


def _line(what: str, planned: float, measured: float) -> list[str]:
    return [what, f"{planned:.3g}", f"{measured:.3g}", f"{planned / measured - 1:+.1%}" if measured else "–"]
