"""The time model's constants from measured steps: the least squares of relative misses, by coordinate descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline.planner.gpus import find_gpu
from pipeline.planner.layer_time import FITTED, Fitted
from tools.support.plan_points import Point

FREE = (
    "products",
    "attention",
    "segment",
    "memory",
    "layer_s",
    "host_op_s",
    "links",
    "host_elements",
    "thread_elements",
)
"""Constants that are fitted; the others stay."""
PRIOR = 2e-4
"""Weight of a constant's own (relative, squared) change: what no point speaks for stays where it is."""
ROUNDS = 60


def fit(points: Sequence[Point], start: Fitted = FITTED) -> Fitted:
    """Constants for the points that are marked `fit`.

    Args:
        points: measured steps.
        start: where to begin, and what constants stay near that no point depends on.
    """
    known = [(point.plan(), find_gpu(point.gpu), point) for point in points if point.use == "fit" and point.seconds]

    def loss(fitted: Fitted) -> float:
        total = 0.0
        for plan, gpu, point in known:
            found = point.step_seconds(plan, gpu, fitted)
            total += math.log(found / (point.seconds or 1.0)) ** 2
        moved = sum(math.log(getattr(fitted, name) / getattr(start, name)) ** 2 for name in FREE)
        return total + PRIOR * moved

    best, least, step = start, loss(start), 0.1
    for _ in range(ROUNDS):
        better = False
        for name in FREE:
            for factor in (1 + step, 1 / (1 + step)):
                tried = replace(best, **{name: getattr(best, name) * factor})
                found = loss(tried)
                if found < least:
                    best, least, better = tried, found, True
        if not better:
            step /= 2
    return best


def left_out(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Every fitted point, and how far the constants that suit the other points are off it (relative).

    What no other point speaks for stays as it is: the figure says nothing of that constant.
    """
    found = []
    for point in (each for each in points if each.use == "fit" and each.seconds):
        constants = fit([other for other in points if other is not point])
        seconds = point.step_seconds(point.plan(), find_gpu(point.gpu), constants)
        found.append((point, seconds / (point.seconds or 1.0) - 1))
    return found
