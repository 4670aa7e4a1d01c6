"""Which tokens are scored behind a prompt, and what a long sample keeps, by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.conversations import RecordError
from pipeline.data.masks import Sample, behind_prompt, truncated

IDS = st.lists(st.integers(0, 2), max_size=12)


@given(IDS, IDS)
def test_scored_from_the_first_token_that_is_not_the_prompts(prompt: list[int], whole: list[int]) -> None:
    same = 0
    for one, other in zip(prompt, whole, strict=False):  # as TRL counts it
        if one != other:
            break
        same += 1
    sample = behind_prompt(prompt, whole)
    assert sample.tokens.tolist() == whole
    assert sample.scored.tolist() == [False] * same + [True] * (len(whole) - same)
    assert sample.joined == (same < len(prompt))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6), st.integers(1, 900), st.data())
def test_a_cut_takes_one_stretch_of_plain_tokens(
    stretches: list[tuple[bool, bool]], limit: int, data: st.DataObject
) -> None:
    """Tokens are numbered, those from 10_000 on are special."""
    sizes = [data.draw(st.integers(1, 400)) for _ in stretches]
    scored = np.repeat([flag for flag, _ in stretches], sizes)
    numbers = np.arange(scored.size, dtype=np.uint32) + 10_000 * np.repeat([flag for _, flag in stretches], sizes)
    numbers = numbers.astype(np.uint32)
    special = np.arange(10_000, 10_000 + scored.size, dtype=np.uint32)
    whole = Sample(numbers, scored)
    protected = scored | (numbers >= 10_000)
    try:
        cut = truncated(whole, limit, special)
    except RecordError:
        runs = np.split(~protected, np.flatnonzero(np.diff(protected)) + 1)
        assert max(int(run.sum()) for run in runs) < scored.size - limit + 128, "64 stay at each end"
        return
    assert cut.tokens.size == min(limit, scored.size) and cut.cut == scored.size - cut.tokens.size
    gone = np.flatnonzero(~np.isin(numbers, cut.tokens))
    assert not protected[gone].any()
    if gone.size:
        assert np.array_equal(gone, np.arange(gone[0], gone[-1] + 1))
        before, behind = protected[: gone[0]][::-1], protected[gone[-1] + 1 :]
        assert not before[:64].any() and not behind[:64].any() and min(before.size, behind.size) >= 64


def test_a_sample_that_fits_is_left_alone() -> None:
    sample = behind_prompt([1, 2], [1, 2, 3])
    assert truncated(sample, 3, np.zeros(0, np.uint32)) is sample
    with pytest.raises(RecordError, match="does not fit 2 tokens"):
        truncated(sample, 2, np.zeros(0, np.uint32))
