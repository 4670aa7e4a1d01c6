"""Where a step's time goes: waiting for data, passes over the model, sums of gradients that no computation hides.

On a GPU the marks are events in the computing stream, which waits for sums that are not done: what lies between two of
them is what the GPU could not hide. They are read once the host waits for the GPU anyway.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

PHASES = {"data_s": "data", "passes_s": "passes", "sums_s": "sums"}
"""Keys of a step's seconds in a line of metrics -> what the display calls them. The rest of `seconds` is the update and
what lies between steps."""
SHOWN = 0.005
"""Share of a step from which a wait is shown."""


class StepClock:
    """Marks in time, on this rank's device.

    Args:
        device: the rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def begin(self) -> None:
        """Forget the last step's marks; the first phase begins."""
        self._marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """Phase `name` ends here, and the next one begins."""
        self._marks.append((name, self._now()))

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Of every phase; on a GPU once the host has waited for what was queued before the last mark."""
        found = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) or isinstance(after, float):
                assert isinstance(before, float) and isinstance(after, float), "all marks are of one kind"
                found[name] = after - before
            else:
                found[name] = before.elapsed_time(after) / 1000
        return found


def waits(row: Mapping[str, float]) -> str:
    """What a step waited for, in words, from a line of metrics; empty: nothing worth a word."""
    shares = ((PHASES[key], row[key] / row["seconds"]) for key in ("sums_s", "data_s") if key in row)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= SHOWN)
