"""What lives at a peak, counted by hand and against a replay block by block."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tools.support.live_memory import Live, at_peak


def block(address: int, size: int, *frames: tuple[str, int]) -> dict[str, Any]:
    named = [{"filename": file, "line": line, "name": "f"} for file, line in frames]
    return {"action": "alloc", "addr": address, "size": size, "frames": named}


def freed(address: int) -> dict[str, Any]:
    return {"action": "free_completed", "addr": address, "size": 0}


def test_blocks_are_named_by_our_own_lines() -> None:
    torch_, ours = ("/site/torch/nn/functional.py", 9), ("/x/pipeline/model/chunk.py", 3)
    outer = [("/x/pipeline/a.py", number) for number in range(5)]
    trace = [
        block(1, 100, torch_, ours),
        block(2, 50, torch_, ours),
        freed(1),
        block(3, 80, torch_, *outer),
        {"action": "free_requested", "addr": 3, "size": 80},  # not yet free
        block(1, 70, torch_),
        block(5, 1),
        freed(7),  # from before the trace
        freed(3),
    ]
    assert at_peak(trace) == [
        Live("a.py:0:f < a.py:1:f < a.py:2:f < a.py:3:f", 1, 80),
        Live("functional.py:9:f", 1, 70),
        Live("chunk.py:3:f", 1, 50),
        Live("(a backward without a Python frame)", 1, 1),
    ]
    assert at_peak([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40))
def test_a_peak_is_the_highest_of_all_moments(moves: list[tuple[int, int]]) -> None:
    trace, live, heights = [], dict[int, int](), [0]
    for address, size in moves:
        if address in live:
            del live[address]
            trace.append(freed(address))
        else:
            live[address] = size
            trace.append(block(address, size))
        heights.append(sum(live.values()))
    assert sum(row.nbytes for row in at_peak(trace)) == max(heights)
