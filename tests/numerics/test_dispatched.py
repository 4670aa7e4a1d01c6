"""The operations of a layer that the planner counts for the host against those that the model dispatches."""

from __future__ import annotations

import pytest

from pipeline.planner.host_work import OPERATIONS
from pipeline.planning.recompute import RecomputePolicy
from tests.support.dispatched import operations
from tests.support.interpreted import interpret_all

CASES = [
    ("bf16", 1, "full", 2),
    ("bf16", 4, "none", 2),
    ("fp8", 4, "none", 2),
    ("nf4", 4, "full", 1),
]
NEAR = 0.03
"""Relative; what torch's own functions are made of changes with its release."""


def _counted(base: str, tp: int, recompute: str, tiles: int) -> None:
    whole, tile = OPERATIONS[base, tp > 1][RecomputePolicy(recompute)]
    assert operations(base, tp, recompute, tiles) == pytest.approx(whole + (tiles - 1) * tile, rel=NEAR)


def test_the_planner_counts_what_is_dispatched() -> None:
    told = interpret_all([f"test_dispatched._counted{case}" for case in CASES])
    assert not any(told.values()), told
