"""The learning-rate schedule: where it starts, peaks and ends, and that nothing else happens in between."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.training.schedule import learning_rate

PEAK = 2e-5
steps = st.integers(min_value=1, max_value=400)
warmups = st.integers(min_value=0, max_value=60)
ratios = st.floats(min_value=0.0, max_value=1.0)


def whole(warmup: int, total: int, schedule: str, ratio: float = 0.1) -> list[float]:
    return [learning_rate(step, PEAK, warmup, total, schedule, ratio) for step in range(total)]


def test_paper_recipe_first_step_learns_and_step_20_is_at_the_peak() -> None:
    rates = whole(20, 1000, "constant")
    assert rates[0] == pytest.approx(PEAK / 20)
    assert rates[9] == pytest.approx(PEAK / 2)
    assert rates[18] == pytest.approx(PEAK * 19 / 20)
    assert set(rates[19:]) == {PEAK}


def test_cosine_midpoint_and_end() -> None:
    rates = whole(1, 101, "cosine", 0.1)
    assert rates[0] == PEAK
    assert rates[50] == pytest.approx(PEAK * 0.55)
    assert rates[25] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert rates[100] == pytest.approx(PEAK * 0.1, rel=1e-12)


@given(total=steps, warmup=warmups, ratio=ratios, schedule=st.sampled_from(["constant", "cosine"]))
def test_never_zero_in_warmup_never_above_the_peak_and_rises_then_falls(
    total: int, warmup: int, ratio: float, schedule: str
) -> None:
    rates = whole(warmup, total, schedule, ratio)
    assert rates[0] == pytest.approx(PEAK / max(warmup, 1))
    assert max(rates) <= PEAK
    rising, falling = rates[:warmup], rates[max(warmup - 1, 0) :]
    assert all(a < b for a, b in zip(rising, rising[1:], strict=False))
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    if warmup <= total:
        assert rates[max(warmup - 1, 0)] == PEAK


@given(total=steps, warmup=warmups, ratio=ratios)
def test_cosine_ends_at_its_floor_and_stays_there(total: int, warmup: int, ratio: float) -> None:
    assume(total > max(warmup, 1))
    last = learning_rate(total - 1, PEAK, warmup, total, "cosine", ratio)
    assert last == pytest.approx(PEAK * ratio, rel=1e-9, abs=1e-18)
    assert learning_rate(total + 10, PEAK, warmup, total, "cosine", ratio) == last


@given(step=st.integers(0, 500), warmup=warmups, total=steps)
def test_scales_with_the_peak(step: int, warmup: int, total: int) -> None:
    one, three = (learning_rate(step, peak, warmup, total, "cosine", 0.1) for peak in (1.0, 3.0))
    assert three == pytest.approx(3 * one, rel=1e-12)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        learning_rate(-1, PEAK, 2, 10, "constant", 0.1)
    with pytest.raises(ValueError, match="linear"):
        learning_rate(0, PEAK, 2, 10, "linear", 0.1)
