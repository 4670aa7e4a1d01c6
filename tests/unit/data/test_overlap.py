"""Passages of the evaluation text that the training text holds too, against a search by definition."""

from __future__ import annotations

import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data import overlap


@dataclass
class Tokens:
    """What `overlap` reads of a token store."""

    values: NDArray[np.uint32]
    scored: None = None

    def __len__(self) -> int:
        return len(self.values)

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        return self.values[start:stop]


def holds(text: list[int], passage: list[int]) -> bool:
    return any(text[at : at + len(passage)] == passage for at in range(len(text) - len(passage) + 1))


@given(
    seed=st.integers(0, 2**32 - 1),
    words=st.integers(1, 4),
    train=st.integers(0, 300),
    held_out=st.integers(0, 120),
    chunk=st.integers(1, 90),
    copied=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 120), st.integers(1, 40)), max_size=3),
)
def test_found_is_what_a_search_finds(
    seed: int, words: int, train: int, held_out: int, chunk: int, copied: list[tuple[int, int, int]]
) -> None:
    draw = np.random.default_rng(seed)
    text, other = (draw.integers(0, words, n).astype(np.uint32) for n in (train, held_out))
    for here, there, length in copied:
        length = max(0, min(length, train - here, held_out - there))
        text[here : here + length] = other[there : there + length]
    with mock.patch.multiple(overlap, PASSAGE=8, _CHUNK=chunk):
        passages = overlap._passages(Tokens(other))  # type: ignore[arg-type]
        found = overlap._found(Tokens(text), passages)  # type: ignore[arg-type]
    assert found == sum(holds(text.tolist(), passage.tolist()) for passage in passages)


def test_words_that_stand_together_a_million_times_take_no_minutes() -> None:
    text, other = (np.zeros(n, np.uint32) for n in (2_000_000, 5_000))
    text[::60] = 1  # no passage of 64 tokens is of zeros alone
    began = time.process_time()
    passages = overlap._passages(Tokens(other))  # type: ignore[arg-type]
    assert overlap._found(Tokens(text), passages) == 0  # type: ignore[arg-type]
    assert time.process_time() - began < 60, "it was minutes, a comparison a place"
