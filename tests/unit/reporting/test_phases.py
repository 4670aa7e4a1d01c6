"""A step's seconds by phase, and which of them are worth a word."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline.reporting.phases import StepClock, waits


def test_phases_are_what_lies_between_marks() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):  # the second step forgets the first
        clock.begin()
        time.sleep(0.05)
        clock.mark("passes_s")
        time.sleep(0.01)
        clock.mark("sums_s")
    found = clock.seconds()
    assert [*found] == ["passes_s", "sums_s"] and 0.05 <= found["passes_s"] < 0.5 and 0.01 <= found["sums_s"] < 0.5


@pytest.mark.gpu
def test_on_a_gpu_the_stream_is_timed_not_the_host() -> None:
    clock, one = StepClock(torch.device("cuda")), torch.ones(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    clock.begin()
    for _ in range(20):
        one = one @ one
    clock.mark("passes_s")
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    assert queued < clock.seconds()["passes_s"] <= whole * 1.01


def test_only_what_counts_is_told() -> None:
    row = {"seconds": 10.0, "passes_s": 9.0, "sums_s": 0.5, "data_s": 0.01}
    assert waits(row) == "sums 5%"
    assert waits(row | {"data_s": 2.0}) == "sums 5%, data 20%"
    assert waits({"seconds": 10.0}) == "" == waits(row | {"sums_s": 0.0})
