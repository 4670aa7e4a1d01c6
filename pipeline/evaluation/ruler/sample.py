"""One prompt of RULER with what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Count = Callable[[str], int]
"""Text -> its tokens, with those that a tokenizer puts before a prompt."""


TRIES = 100
"""Draws at most for one that fits."""


def first_fitting[Drawn](
    draw: Callable[[int], Drawn], fits: Callable[[Drawn], bool], size: int, step: int
) -> Drawn | None:
    """The first draw that fits, each after it smaller by a step while there is more than one; None: none of TRIES.

    Args:
        draw: makes one of a size; not asked where the size is 0 or less.
    """
    for _ in range(TRIES):
        if size > 0 and fits(found := draw(size)):
            return found
        if size > step:
            size -= step
    return None


@dataclass(frozen=True)
class Sample:
    """One prompt."""

    prompt: str
    """Ends where the model's reply goes on."""
    answers: tuple[str, ...]
    """All are wanted."""
    new: int
    """Tokens the model may write."""
