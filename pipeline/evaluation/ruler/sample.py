"""One prompt of RULER with what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Count = Callable[[str], int]
"""Text -> its tokens, with those that a tokenizer puts before a prompt."""


@dataclass(frozen=True)
class Sample:
    """One prompt."""

    prompt: str
    """Ends where the model's reply goes on."""
    answers: tuple[str, ...]
    """All are wanted."""
    new: int
    """Tokens the model may write."""
