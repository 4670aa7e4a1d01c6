"""Long documents in parts that can be tokenized one by one, with exactly the tokens of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

SEGMENT = 1 << 18
"""Characters after which a document is cut at the next place where it may be; tokenizing takes 100 bytes for each."""
_PAIRS = 2000
"""Pairs of characters that are asked about before a piece of text counts as one without a place to cut."""


class Segment(NamedTuple):
    """A document, or a part of one."""

    left: str
    """The character before it in its document; "" at the beginning."""
    text: str
    ends: bool
    """The document ends with it."""


def segments(
    pieces: Iterable[tuple[str, bool]], may_cut: Callable[[str, str], bool], size: int = SEGMENT
) -> Iterator[Segment]:
    """Cut documents where the rule allows it, once they are longer than `size` characters.

    Args:
        pieces: text of documents in order, in pieces cut anywhere, each with whether its document ends there.
        may_cut: called with the characters before and after a place, see `TextTokenizer.may_cut`.
    """
    verdicts: dict[tuple[str, str], bool] = {}

    def allowed(pair: tuple[str, str]) -> bool:
        verdict = verdicts.get(pair)
        if verdict is None:
            verdict = verdicts[pair] = bool(pair[0]) and may_cut(*pair)
        return verdict

    def last_cut(before: str, text: str) -> int:
        """The last place in `text` that may be cut, 0 being between `before` and it; -1: none was found."""
        # Between words or lines first; a script without them has too many pairs of characters to ask about them all.
        for blank in (True, False):
            enough = len(verdicts) + _PAIRS
            for place in range(len(text) - 1, -1, -1):
                if (text[place] in " \n") is blank:
                    if allowed((text[place - 1] if place else before, text[place])):
                        return place
                    if len(verdicts) > enough:
                        break
        return -1

    held: list[str] = []
    left, length = "", 0
    for text, ends in pieces:
        if length + len(text) > size and text:
            place = last_cut(held[-1][-1] if held else "", text)
            if place >= 0 and length + place:
                whole = "".join([*held, text[:place]])
                yield Segment(left, whole, False)
                left, held, length, text = whole[-1], [], 0, text[place:]
        if text:
            held.append(text)
            length += len(text)
        if ends:
            yield Segment(left, "".join(held), True)
            left, held, length = "", [], 0
