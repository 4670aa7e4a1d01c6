"""The words of RULER's keys and lists: those of the wonderwords package, which lm-evaluation-harness draws from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import overload

_FILE = Path(__file__).with_name("words.txt")


@cache
def words_of(kind: str) -> tuple[str, ...]:
    """Sorted words that are a noun, adjective or verb."""
    found: dict[str, list[str]] = {}
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = []
        elif not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return tuple(found[kind])


@cache
def all_words() -> tuple[str, ...]:
    """Every word once, sorted."""
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in words_of(kind)}))


class WordPairs(Sequence[str]):
    """Every adjective-noun, sorted: six million, of which only those that are looked at are made."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._blocks: list[list[str]] = []
        """Adjectives that begin alike: `blue-eyed-…` comes amid `blue-…`."""
        for adjective in sorted(set(adjectives), key=lambda word: f"{word}-"):
            if self._blocks and f"{adjective}-".startswith(f"{self._blocks[-1][0]}-"):
                self._blocks[-1].append(adjective)
            else:
                self._blocks.append([adjective])
        self._starts = [0]
        for block in self._blocks:
            self._starts.append(self._starts[-1] + len(block) * len(self._nouns))
        self._mixed: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        block, at = self._blocks[number], index - self._starts[number]
        if len(block) == 1:
            return f"{block[0]}-{self._nouns[at]}"
        if number not in self._mixed:
            self._mixed[number] = sorted(f"{adjective}-{noun}" for adjective in block for noun in self._nouns)
        return self._mixed[number][at]


@cache
def word_pairs() -> WordPairs:
    """What keys are drawn from."""
    return WordPairs(words_of("adjective"), words_of("noun"))
