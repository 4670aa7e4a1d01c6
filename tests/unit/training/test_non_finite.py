"""The non-finite guard: skips, counts, forgives, stops, and remembers across a resume."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import CheckpointError, LongspanError
from pipeline.training.non_finite import NonFiniteGuard, TrainingDiverged

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("loss", "norm", "applied"),
    [(2.5, 1.0, True), (0.0, 0.0, True), (NAN, 1.0, False), (2.5, INF, False), (-INF, 1.0, False), (2.5, NAN, False)],
)
def test_only_finite_steps_are_applied(loss: float, norm: float, applied: bool) -> None:
    guard = NonFiniteGuard(3)
    assert guard.check(loss, norm) is applied
    assert guard.skipped == int(not applied)


def test_stops_at_the_limit_with_one_useful_sentence() -> None:
    guard = NonFiniteGuard(3)
    guard.check(NAN, 1.0)
    guard.check(2.0, 1.0)
    guard.check(NAN, 1.0)
    guard.check(2.0, INF)
    with pytest.raises(TrainingDiverged) as stopped:
        guard.check(NAN, INF)
    message = str(stopped.value)
    assert isinstance(stopped.value, LongspanError)
    for part in ("step 5", "loss nan", "gradient norm inf", "3 non-finite steps", "4 skipped", "train.lr", "data"):
        assert part in message
    assert "\n" not in message


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6))
def test_stops_exactly_when_a_run_of_bad_steps_reaches_the_limit(good: list[bool], limit: int) -> None:
    guard = NonFiniteGuard(limit)
    run, stop = 0, None
    for index, ok in enumerate(good):
        run = 0 if ok else run + 1
        if run == limit:
            stop = index
            break
    for index, ok in enumerate(good):
        if index == stop:
            with pytest.raises(TrainingDiverged):
                guard.check(NAN, 1.0)
            return
        assert guard.check(1.0 if ok else NAN, 1.0) is ok
    assert stop is None
    assert (guard.steps, guard.skipped) == (len(good), good.count(False))


def test_a_resumed_guard_continues_the_count() -> None:
    first = NonFiniteGuard(3)
    first.check(1.0, 1.0)
    first.check(NAN, 1.0)
    first.check(NAN, 1.0)
    second = NonFiniteGuard(3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(TrainingDiverged, match=r"step 4.*\(3 skipped"):
        second.check(NAN, 1.0)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"steps": 1, "skipped": 0},
        {"steps": 1, "skipped": -1, "consecutive": 0},
        {"steps": 1.5, "skipped": 0, "consecutive": 0},
    ],
)
def test_damaged_state_is_an_error(state: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="guard"):
        NonFiniteGuard(3).load_state_dict(state)


def test_limit_must_allow_a_step() -> None:
    with pytest.raises(ValueError, match="limit"):
        NonFiniteGuard(0)
