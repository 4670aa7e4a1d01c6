"""What is far beyond the last steps, and whose numbers differ when a step is computed twice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.training.spikes import HISTORY, LEAST, QUIET, Figures, Recent, apart, blame, differs

NAN, INF = math.nan, math.inf
EXACT, GPU = (0.0, 0.0), (1e-3, 5e-2)


def steady(count: int, seed: int = 0) -> Recent:
    """After so many ordinary steps: losses about 2 by 0.02, norms about 1 by a tenth."""
    draw, recent = np.random.default_rng(seed), Recent()
    for _ in range(count):
        recent.take(2 + 0.02 * draw.standard_normal(), math.exp(0.1 * draw.standard_normal()))
    return recent


def test_the_bounds_are_those_of_a_normal_distribution() -> None:
    """Of many draws; a few wild ones among them change little."""
    loss, norm = zip(*(steady(HISTORY, seed).bounds() for seed in range(40)), strict=True)
    assert np.median(loss) == pytest.approx(2 + 8 * 0.02, rel=0.02)
    assert np.median(norm) == pytest.approx(max(3, math.exp(8 * 0.1)), rel=0.1) and min(norm) > 2.5
    wild, draw = steady(HISTORY - 16), np.random.default_rng(1)
    for _ in range(8):
        wild.take(2 + 0.02 * draw.standard_normal(), math.exp(0.1 * draw.standard_normal()))
        wild.take(*((50.0, 1000.0) if _ % 2 else (2.0, 1.0)))
    assert wild.bounds()[0] < 2.6 and wild.bounds()[1] < 8


def test_a_trend_is_no_noise() -> None:
    recent = Recent()
    for step in range(HISTORY):
        recent.take(8 - 0.1 * step, math.exp(-0.05 * step))
    level = 8 - 0.1 * (HISTORY - 5)
    assert recent.bounds()[0] == pytest.approx(level + 8 * 1.4826 * 0.1 / 2**0.5)
    assert recent.beyond(level + 0.9, 1.0) and not recent.beyond(level + 0.8, math.exp(-0.05 * 60))


def test_what_hardly_moves_is_not_judged_by_its_last_digits() -> None:
    recent = Recent()
    for _ in range(LEAST):
        recent.take(2.0, 1.0)
    assert recent.beyond(2.09, 2.9) == ""
    assert recent.beyond(2.11, 1.0).startswith("loss 2.11 is far beyond the last 16 steps' (bound 2.1)")
    both = recent.beyond(9.0, 3.1)
    assert "loss 9 is" in both and " and gradient norm 3.1 is" in both


def test_too_few_steps_tell_nothing_but_what_is_not_finite() -> None:
    recent = steady(LEAST - 1)
    assert recent.beyond(100.0, 100.0) == ""
    for pair in ((NAN, 1.0), (2.0, INF), (INF, NAN)):
        assert "not finite" in recent.beyond(*pair)
        recent.take(*pair)
    assert recent.beyond(100.0, 100.0) == "", "what is not finite is no experience"
    recent.take(2.0, 1.0)
    assert recent.beyond(100.0, 100.0)


def test_after_a_rerun_a_new_level_is_left_alone() -> None:
    recent = steady(HISTORY)
    recent.rest()
    for _ in range(QUIET):
        assert recent.beyond(4.0, 1.0) == "" and recent.beyond(NAN, 1.0)
        recent.take(4.0, 1.0)
    assert recent.beyond(4.0, 1.0) == "" and recent.beyond(6.0, 1.0), "and is what the next steps are judged by"


@pytest.mark.parametrize(
    ("one", "other", "tolerance", "expected"),
    [
        (1.0, 1.0, 0.0, False),
        (1.0, 1.0 + 1e-15, 0.0, True),
        (1.0, 1.0009, 1e-3, False),
        (1.0, 1.002, 1e-3, True),
        (NAN, NAN, 0.0, False),
        (NAN, INF, 0.0, False),
        (NAN, 1.0, 1e-3, True),
        (1.0, INF, 1e-3, True),
        (0.0, 0.0, 1e-3, False),
    ],
)
def test_differs(one: float, other: float, tolerance: float, expected: bool) -> None:
    assert differs(one, other, tolerance) is expected is differs(other, one, tolerance)


def test_blame() -> None:
    ranks = [Figures(10.0 + rank, 1.0, 2.0, 3.0) for rank in range(4)]
    assert blame(ranks, ranks, EXACT) == ([], "the sums over the ranks")
    noise = [replace(one, own_norm=1.01, norm=3.01) for one in ranks]
    assert blame(ranks, noise, GPU)[0] == [] and blame(ranks, noise, EXACT)[0] == [0, 1, 2, 3]
    for field in ("own_loss", "own_norm"):
        # Everybody's sums are wrong then, and one rank's own share.
        wrong = [replace(one, loss=9.0, norm=NAN) for one in ranks]
        wrong[2] = replace(wrong[2], **{field: 77.0})
        assert blame(wrong, ranks, GPU) == ([2], "itself")
    left = [*ranks[:3], replace(ranks[3], norm=INF)]
    assert blame(left, ranks, EXACT) == ([3], "the sums over the ranks")
    assert blame([replace(one, norm=4.0) for one in ranks], ranks, EXACT)[0] == [0, 1, 2, 3]


def test_a_rank_that_is_left_with_other_figures_is_told_from_the_rest() -> None:
    """All ranks should have the step's loss and norm: one that has not would go another way than its peers."""
    ranks = [Figures(10.0 + rank, 1.0, 2.0, 3.0) for rank in range(4)]
    assert apart(ranks, (0, 0)) == []
    for changed in ({"loss": math.nan}, {"norm": math.inf}, {"norm": 3.1}):
        assert apart([*ranks[:2], replace(ranks[2], **changed), ranks[3]], (1e-3, 1e-2)) == [2], changed
    assert apart([replace(one, norm=3.0 + 1e-3 * rank) for rank, one in enumerate(ranks)], (1e-3, 1e-2)) == []
    spoilt = [replace(one, loss=math.nan) for one in ranks]
    assert apart(spoilt, (0, 0)) == [], "bad data are bad on every rank"
    assert apart([*spoilt[:3], ranks[3]], (0, 0)) == [3]
    assert apart([ranks[0], spoilt[1]], (0, 0)) == [1] and apart([spoilt[0], ranks[1]], (0, 0)) == [0]
    # Found by reading: by the median of each figure for itself both ranks were wrong, and nobody was left to compare.
    assert apart([ranks[0], replace(ranks[1], loss=3.0, norm=2.0)], (1e-3, 1e-2)) == [1]
