"""The non-finite guard: skips, counts, forgives, stops, and remembers across a resume."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import CheckpointError, LongspanError
from pipeline.training.non_finite import DivergenceGuard, TrainingDiverged

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("loss", "norm", "applied"),
    [(2.5, 1.0, True), (0.0, 0.0, True), (NAN, 1.0, False), (2.5, INF, False), (-INF, 1.0, False), (2.5, NAN, False)],
)
def test_only_finite_steps_are_applied(loss: float, norm: float, applied: bool) -> None:
    guard = DivergenceGuard(3)
    assert guard.check(loss, norm) is applied
    assert guard.skipped == int(not applied)


def test_stops_at_the_limit_with_one_useful_sentence() -> None:
    guard = DivergenceGuard(3)
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
    guard = DivergenceGuard(limit)
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
    first = DivergenceGuard(3)
    first.check(1.0, 1.0)
    first.check(NAN, 1.0)
    first.check(NAN, 1.0)
    second = DivergenceGuard(3)
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
        DivergenceGuard(3).load_state_dict(state)


def test_limit_must_allow_a_step() -> None:
    with pytest.raises(ValueError, match="limit"):
        DivergenceGuard(0)


def test_a_loss_above_a_uniform_guess_is_a_divergence() -> None:
    """ln 128 = 4.852; the margin is one nat."""
    guard = DivergenceGuard(3, vocab=128)
    for loss in (2.0, 5.84, 5.87, 5.0, 5.87, 900.0):
        assert guard.check(loss, 1.0) is True, "a high loss is applied: its weights are what they are"
    assert (guard.consecutive, guard.skipped, guard.last_sound_step) == (2, 0, 3)
    with pytest.raises(
        TrainingDiverged, match=r"^Training stopped at step 7: loss 6 is above 5\.9, .*128 tokens"
    ) as told:
        guard.check(6.0, 1.0)
    assert "3 steps in a row" in str(told.value) and "train.lr" in str(told.value)
    # The weights after step 4 gave the first high loss, in step 5.
    assert guard.last_sound_step == 3


def test_a_run_that_begins_worse_than_a_guess_is_no_divergence() -> None:
    """A random model's logits are not zero, and a badly stretched one is sure of the wrong tokens."""
    guard = DivergenceGuard(2, vocab=128)
    for loss in (9.0, 9.5, 9.9, 9.2, 8.0, 7.0):
        assert guard.check(loss, 1.0)
    assert guard.consecutive == 0 and not guard.high
    guard.check_end()
    guard.check_evaluation({64: 9.9, 128: 400.0})  # one length stands
    with pytest.raises(TrainingDiverged, match=r"^The weights of step 6 lose 64: 10\.1, 128: nan nats"):
        guard.check_evaluation({64: 10.1, 128: NAN})
    assert guard.last_sound_step == 5
    guard.check_evaluation({})


def test_a_high_loss_of_the_last_step_is_told_and_remembered() -> None:
    guard = DivergenceGuard(5, vocab=128)
    guard.check(4.0, 1.0)
    guard.check(70.0, 1.0)
    again = DivergenceGuard(5, vocab=128)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(TrainingDiverged, match="ended at step 2 with a loss above 5.9"):
        again.check_end()
    # Of releases that kept no losses.
    again.load_state_dict({"steps": 3, "skipped": 1, "consecutive": 1})
    assert again.first_loss is None and not again.high and again.last_sound_step == 1
    # A step that is not finite after high ones leaves the doubt about their weights.
    mixed = DivergenceGuard(3, vocab=128)
    for loss in (4.0, 70.0, NAN):
        mixed.check(loss, 1.0)
    assert (mixed.consecutive, mixed.last_sound_step) == (2, 0)
