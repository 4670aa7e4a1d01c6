"""How a model that is trained on conversations is to be asked, and where it stops: template and ends of answers.

A base model's files know neither: its end of text is another token than the end of a turn, and without that one whoever
generates with the trained model goes on behind the answer, into the user's next question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.masks import Sample
from pipeline.data.shards import Manifest


@dataclass(frozen=True)
class ChatFormat:
    """What conversations were trained with."""

    template: str = ""
    """Jinja text; empty: none, as of plain pairs."""
    ends: tuple[int, ...] = ()
    """Ids of the tokens that end answers, ascending."""

    def recorded(self) -> dict[str, Any]:
        """As JSON."""
        return {"template": self.template, "answer_ends": list(self.ends)}


def format_of(recorded: Any) -> ChatFormat | None:
    """`ChatFormat.recorded` read back; None: nothing is recorded.

    Raises:
        ValueError: it is damaged.
    """
    if recorded is None:
        return None
    if not isinstance(recorded, dict):
        raise ValueError(f"chat is {recorded!r}")
    template, ends = recorded.get("template", ""), recorded.get("answer_ends", [])
    if not isinstance(template, str) or not isinstance(ends, list):
        raise ValueError("chat has no template and answer_ends")
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ValueError(f"answer_ends are {ends!r}")
    return ChatFormat(template, tuple(ends))


def trained_format(manifests: Iterable[Manifest]) -> tuple[ChatFormat | None, tuple[str, ...]]:
    """The format that prepared folders of conversations share, and a sentence where they do not.

    Of several templates the first source's is taken, since a model's folder has one.
    """
    chats = [manifest for manifest in manifests if manifest.chat]
    if not chats:
        return None, ()
    templates = list(dict.fromkeys(one.template for one in chats if one.template))
    ends = tuple(sorted({end for one in chats for end in one.answer_ends}))
    if not (templates or ends):
        return None, ()  # prepared by an earlier release, which did not write it down
    told = f"data.path: its conversations went through {len(templates)} chat templates; an export takes the first's."
    return ChatFormat(templates[0] if templates else "", ends), (told,) if len(templates) > 1 else ()


class EndFinder:
    """Finds the tokens that end a sample's answers.

    Args:
        special: ids of special tokens.
        added: ids of those that are added to the vocabulary without being special; they count where no special one is.
        decode: text of ids.
    """

    def __init__(self, special: frozenset[int], added: frozenset[int], decode: Callable[[list[int]], str]) -> None:
        self._special, self._added, self._decode = special, added, decode
        self._is_special = np.zeros(max(special, default=0) + 2, np.bool_)
        self._is_special[list(special)] = True
        self._blank: dict[int, bool] = {}

    def ends(self, sample: Sample) -> tuple[Counter[int], set[int]]:
        """How many answers each token ends, behind which nothing but blanks is scored; and special tokens that text
        follows in an answer, as it does the end of the reasoning before it: whoever stopped there would lose the rest.
        """
        found: Counter[int] = Counter()
        within: set[int] = set()
        tokens, scored = sample.tokens, sample.scored
        # Few tokens of an answer are special: looking from each of those costs less than looking at each answer.
        special = self._is_special.take(tokens, mode="clip")  # the last place stands for all ids behind it
        special &= scored
        for place in special.nonzero()[0].tolist():
            token = int(tokens[place])
            behind = self._behind(sample, place)
            if behind is None:
                within.add(token)
            elif not behind & self._special:
                found[token] += 1
        if not found and self._added:
            for place in np.flatnonzero(scored & np.isin(tokens, list(self._added))).tolist():
                if self._behind(sample, place) == set():
                    found[int(tokens[place])] += 1
        return found, within

    def _behind(self, sample: Sample, place: int) -> set[int] | None:
        """Special and added tokens behind a token of an answer; None: text stands there."""
        found = set()
        for later in range(place + 1, sample.tokens.size):
            if not sample.scored[later]:
                break
            token = int(sample.tokens[later])
            if token in self._special or token in self._added:
                found.add(token)
            elif not self._is_blank(token):
                return None
        return found

    def _is_blank(self, token: int) -> bool:
        blank = self._blank.get(token)
        if blank is None:
            blank = self._blank[token] = not self._decode([token]).strip()
        return blank
