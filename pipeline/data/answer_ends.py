"""How a model that is trained on conversations is to be asked, and where it stops: template and ends of answers.

A base model's files know neither: its end of text is another token than the end of a turn, and without that one whoever
generates with the trained model goes on behind the answer, into the user's next question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
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


@dataclass
class EndFinder:
    """Finds the token that ends a sample's answers.

    Args:
        special: ids of special tokens.
        added: ids of those that are added to the vocabulary without being special; they count where no special one is.
        decode: text of ids.
    """

    special: frozenset[int]
    added: frozenset[int]
    decode: Callable[[list[int]], str]
    _blank: dict[int, bool] = field(default_factory=dict)

    def ends(self, sample: Sample) -> Counter[int]:
        """How many of its answers each of those tokens ends; nothing behind it but blanks is scored."""
        found: Counter[int] = Counter()
        scored = sample.scored
        for last in np.flatnonzero(scored & ~np.append(scored[1:], False)).tolist():
            second = None
            while last >= 0 and scored[last]:
                token = int(sample.tokens[last])
                if token in self.special:
                    found[token] += 1
                    break
                if token in self.added:
                    second = token if second is None else second
                elif not self._is_blank(token):
                    last = -1
                last -= 1
            else:
                if second is not None:
                    found[second] += 1
        return found

    def _is_blank(self, token: int) -> bool:
        blank = self._blank.get(token)
        if blank is None:
            blank = self._blank[token] = not self.decode([token]).strip()
        return blank
