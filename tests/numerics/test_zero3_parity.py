"""Engine zero3 against one process, five steps; as test_parallel_parity.py, with frozen weights sharded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.numerics.test_parallel_parity import OFFLOAD, ZERO3, Grid, compare_all, observe_alone, of_grid
from tools.support.parity import Observed

STEPS = 5
# By processes; what a grid leaves is data parallel.
CASES: dict[int, list[tuple[str, Grid]]] = {
    2: [
        ("untied", Grid(engine=ZERO3)),
        ("tied", Grid(engine=OFFLOAD)),
        ("frozen", Grid(engine=OFFLOAD)),
        ("frozen tied", Grid(engine=ZERO3)),
        ("tied", Grid(cp=2, engine=ZERO3)),
        ("odd", Grid(cp=2, engine=OFFLOAD)),
        ("full", Grid(cp=2, engine=OFFLOAD)),
    ],
    4: [
        ("untied eight", Grid(engine=ZERO3)),
        ("tied", Grid(engine=OFFLOAD)),
        ("frozen", Grid(tp=2, engine=OFFLOAD)),
        ("tied", Grid(tp=2, engine=ZERO3)),
        ("odd", Grid(cp=4, engine=ZERO3)),
        ("untied", Grid(cp=4, engine=OFFLOAD)),
        ("frozen tied", Grid(cp=2, engine=OFFLOAD)),
        ("full", Grid(cp=2, engine=ZERO3)),
    ],
}


def cases_of(world: int) -> list[tuple[str, Grid]]:
    return [of_grid(name, grid, world) for name, grid in CASES[world]]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observed]:
    """What one process computes, by model."""
    names = {name for world in CASES for name, _ in cases_of(world)}
    return observe_alone(tmp_path_factory.mktemp("reference"), sorted(names), STEPS)


@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.crowd
@pytest.mark.parametrize("world", sorted(CASES))
def test_zero3_equals_one_process(world: int, references: dict[str, Observed], tmp_path: Path) -> None:
    compare_all(world, cases_of(world), references, tmp_path, STEPS)
