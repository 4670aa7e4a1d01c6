"""Samples: the tokens of one conversation or completion, which of them the loss counts, and how long ones are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.conversations import RecordError
from pipeline.data.places import as_array

_KEPT = 64
"""Tokens that a truncated stretch keeps at each end: the question stands at one of them, and headers of the message."""


@dataclass(frozen=True)
class Sample:
    """One conversation or completion of T tokens."""

    tokens: NDArray[np.uint32]
    """[T]."""
    scored: NDArray[np.bool_]
    """Whether the loss counts the token (as a target), [T]."""
    cut: int = 0
    """Tokens that truncation took out."""
    joined: bool = False
    """The end of the prompt and what follows became one token, so the prompt alone ends otherwise."""


def within_spans(encoding: Any, spans: list[tuple[int, int]]) -> Sample:
    """The tokens of a text, those from the first to the last of each span scored.

    Args:
        encoding: the library's, of the text.
        spans: from where to where, in characters.
    """
    tokens = as_array(encoding.ids)
    scored = np.zeros(tokens.size, np.bool_)
    for start, stop in spans:
        # As transformers: through the first token of the last character. Characters that a normalizer drops have none;
        # transformers gives up on the rest of the conversation there, we look further inside the answer.
        first = next(filter(_is_token, map(encoding.char_to_token, range(start, stop))), None)
        last = next(filter(_is_token, map(encoding.char_to_token, range(stop - 1, start - 1, -1))), None)
        if first is not None and last is not None:
            scored[first : last + 1] = True
    return Sample(tokens, scored)


def _is_token(number: int | None) -> bool:
    return number is not None


def behind_prompt(prompt: list[int], whole: list[int]) -> Sample:
    """The tokens of a whole text, scored from where they are others than those of its prompt, as in TRL.

    Args:
        prompt: ids of the prompt alone.
        whole: ids of the prompt and what follows it.
    """
    tokens, beginning = as_array(whole), as_array(prompt[: len(whole)])
    others = np.flatnonzero(tokens[: beginning.size] != beginning)
    same = int(others[0]) if others.size else beginning.size
    return Sample(tokens, np.arange(tokens.size) >= same, joined=same < len(prompt))


def truncated(sample: Sample, limit: int, special: NDArray[np.uint32]) -> Sample:
    """The sample in no more than `limit` tokens: the middle of its longest stretch that is not scored goes.

    Neither scored nor special tokens are taken, and `_KEPT` tokens stay at each end of the stretch.

    Args:
        special: ids of special tokens, [n].

    Raises:
        RecordError: that is not enough.
    """
    excess = sample.tokens.size - limit
    if excess <= 0:
        return sample
    free = ~sample.scored & ~np.isin(sample.tokens, special)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False])).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts)) if starts.size else -1
    if longest < 0 or stops[longest] - starts[longest] < excess + 2 * _KEPT:
        raise RecordError(f"it does not fit {limit} tokens without losing question or answer")
    first = int(starts[longest] + (stops[longest] - starts[longest] - excess) // 2)
    keep = np.r_[0:first, first + excess : sample.tokens.size]
    return Sample(sample.tokens[keep], sample.scored[keep], excess, sample.joined)
