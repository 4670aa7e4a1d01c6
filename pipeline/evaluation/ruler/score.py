"""RULER's score of what a model wrote: the share of the answers that occur in it, as lm-evaluation-harness counts."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match(written: str, answers: Sequence[str]) -> float:
    """Share of `answers` that occur in what was written, in any case of letters (RULER's string_match_all).

    What is written further can only raise it.
    """
    text = _CONTROL.sub("\n", written.strip()).strip().lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)
