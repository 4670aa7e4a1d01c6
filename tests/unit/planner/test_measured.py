"""The planner against steps that were measured (tools/bench/points.yaml), those its constants never saw apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from pipeline.planner import clock
from pipeline.planner.gpus import find_gpu
from pipeline.planner.layer_time import FITTED, Fitted
from tools.support.plan_points import POINTS, Miss, Point, misses, read_points, summary

BOUNDS = {"seconds": (0.03, 0.10), "allocated": (0.01, 0.05), "reserved": (0.02, 0.04), "host": (0.02, 0.05)}
"""(median, worst) of the relative misses."""


@pytest.fixture(scope="module")
def everything() -> list[Miss]:
    return misses(read_points())


@pytest.fixture(scope="module")
def found(everything: list[Miss]) -> list[Miss]:
    """What docs/PLANNER.md calls open left out, of their memory nothing."""
    return [miss for miss in everything if (miss.what, miss.point.use) != ("seconds", "open")]


def seconds(point: Point, constants: Fitted) -> float:
    return point.step_seconds(point.plan(), find_gpu(point.gpu), constants)


def test_what_is_called_open_is_far_off(everything: list[Miss]) -> None:
    off = [abs(miss.relative) for miss in everything if (miss.what, miss.point.use) == ("seconds", "open")]
    assert off and min(off) > 0.10 and len(off) < 0.1 * len(everything)


@pytest.mark.parametrize("what", BOUNDS)
def test_near_what_was_measured(found: list[Miss], what: str) -> None:
    median, worst, number = summary(found, what)
    assert number and median <= BOUNDS[what][0] and worst <= BOUNDS[what][1], [
        f"{miss.point.name}: {miss.relative:+.1%}" for miss in found if miss.what == what
    ]


def test_points_that_were_only_predicted_are_near_too(found: list[Miss]) -> None:
    median, worst, number = summary(found, "seconds", "held")
    assert number >= 10 and median <= 0.05 and worst <= 0.10


def test_there_are_more_predicted_points_than_constants() -> None:
    points = read_points()
    held = [point for point in points if point.use == "held"]
    assert len(held) > len(Fitted.__dataclass_fields__)
    assert {point.use for point in points} == {"fit", "held", "open"}
    assert all(point.source for point in points), POINTS


@pytest.mark.parametrize("constant", ["products", "attention", "memory", "links", "host_elements", "host_op_s"])
def test_every_constant_matters(constant: str) -> None:
    """A constant that could be half or twice as large would be one no measured point speaks for."""
    fitted = FITTED
    every = [point for point in read_points() if point.use == "fit" and point.seconds is not None]
    doubled = replace(fitted, **{constant: 2 * getattr(fitted, constant)})
    points = [point for point in every if seconds(point, doubled) != pytest.approx(seconds(point, fitted), rel=0.005)]
    assert points

    def off(factor: float) -> float:
        changed = replace(fitted, **{constant: getattr(fitted, constant) * factor})
        return sum((seconds(point, changed) / (point.seconds or 1.0) - 1) ** 2 for point in points)

    assert min(off(0.5), off(2.0)) > 3 * off(1.0)


def test_where_a_step_goes() -> None:
    """docs/LOG.md 2026-11-28: of 2.62 s on the busiest of CP8 ranks 1.58 are products and 0.37 attention."""
    point = next(point for point in read_points() if point.name == "70B CP8 offload pointwise")
    parts = clock.step_time(point.plan(), find_gpu(point.gpu), alone=True).parts
    assert parts["products"] == pytest.approx(1.58, rel=0.05)
    assert parts["attention"] == pytest.approx(0.37, rel=0.05)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 3", "is no list of measured steps"),
        ("a: [", "cannot be read as YAML"),
        (
            "- {name: a, model: llama2-7b, ranks: 1, context: 8192, use: held, set: {}}",
            "entry 1: .* recompute is missing",
        ),
        ("- {name: a, ranks: 1}", "entry 1: is no measured step"),
    ],
)
def test_what_is_no_file_of_points(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "points.yaml").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_points(tmp_path / "points.yaml")
