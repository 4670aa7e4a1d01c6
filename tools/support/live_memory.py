"""What is on the GPU when a step takes most, by the line of this product that asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.planning.memory import GIB

Entry = Mapping[str, Any]
"""Of a trace of allocations."""
OURS = ("/pipeline/", "/parallel/")
"""Folders whose frames name a block."""
FRAMES = 4
"""Of them, innermost first."""
ROWS = 20


@dataclass(frozen=True)
class Live:
    """Blocks of one origin."""

    where: str
    """Innermost frames, `file:line:function`; those of autograd's own thread have none of ours."""
    count: int
    nbytes: int


def _where(frames: Sequence[Mapping[str, Any]]) -> str:
    own = [one for one in frames if any(folder in one["filename"] for folder in OURS)] or list(frames)
    named = [f"{one['filename'].rsplit('/', 1)[-1]}:{one['line']}:{one['name']}" for one in own[:FRAMES]]
    return " < ".join(named) or "(a backward without a Python frame)"


def _replay(trace: Iterable[Entry]) -> Iterator[tuple[int, dict[int, Entry]]]:
    """(bytes that live, their allocations by address) after every entry."""
    live, height = dict[int, Entry](), 0
    for entry in trace:
        if entry["action"] == "alloc":
            live[entry["addr"]] = entry
            height += entry["size"]
        elif entry["action"] == "free_completed" and entry["addr"] in live:
            height -= live.pop(entry["addr"])["size"]
        yield height, live


def at_peak(trace: Iterable[Entry]) -> list[Live]:
    """The blocks that live when those of a trace together are most, the largest origin first.

    Args:
        trace: entries of `torch.cuda.memory._snapshot()["device_traces"][device]`, of which `alloc` and
            `free_completed` count: `action`, `addr`, `size` (bytes) and `frames`. Blocks from before it are not seen.
    """
    # Replayed twice: copying what lives at every new height would take as long as there are blocks.
    entries = list(trace)
    most = max((height for height, _ in _replay(entries)), default=0)
    best = next((live for height, live in _replay(entries) if height == most), {})
    found = dict[str, list[int]]()
    for entry in best.values():
        found.setdefault(_where(entry.get("frames") or ()), []).append(entry["size"])
    rows = [Live(where, len(sizes), sum(sizes)) for where, sizes in found.items()]
    return sorted(rows, key=lambda row: row.nbytes, reverse=True)


def print_live(work: Callable[[], object], loud: bool) -> None:
    """Do `work` once more with a history of allocations, and print what lived at its peak beside what was there before.

    Args:
        loud: print; every rank has to do the work.
    """
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=4_000_000, stacks="python")
    try:
        work()
        device = torch.cuda.current_device()
        rows = at_peak(torch.cuda.memory._snapshot()["device_traces"][device])
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    if not loud:
        return
    print(
        f"at the peak: {sum(row.nbytes for row in rows) / GIB:.2f} GiB beside {before / GIB:.2f} from before the step"
    )
    for row in rows[:ROWS]:
        print(f"  {row.nbytes / GIB:8.3f} GiB in {row.count:4d}  {row.where}")
