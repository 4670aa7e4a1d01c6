"""Prompts of an exact length in tokens: a statement hidden at some depth of a filler, a question, the answer wanted.

A prompt is put together from token ids, so that a window holds exactly as many tokens as it should: the filler is cut
where it is enough. The pieces are tokenized as they would be in the middle of a document and begin with a line break,
where no tokenizer merges across.

Shapes: S tokens of a window, prompt and answer together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.tokenizer import TextTokenizer

_ANCHOR = "x"
"""What a piece is tokenized after: a letter, with which neither a space nor a line break merges."""

Filler = Callable[[int], Sequence[int] | NDArray[np.int64]]
"""Tokens wanted -> ids of so many tokens of filler."""


@dataclass(frozen=True)
class Prompt:
    """The words of a retrieval task; all but the head begin with a space or a line break."""

    head: str
    """What the task is."""
    statements: tuple[str, ...]
    """What is hidden, in the order in which it is to be found."""
    question: str
    """Ends where the answer begins."""
    answer: str


@dataclass(frozen=True)
class Case:
    """One prompt with its answer, as a window."""

    tokens: NDArray[np.int64]
    """int64 [S]."""
    answer: int
    """Tokens at the window's end that are the answer."""


class PieceEncoder:
    """Ids of text as it stands in the middle of a document, remembered."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._anchor = tokenizer.encode(_ANCHOR)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`, which begins with a space or a line break.

        Raises:
            DataError: the tokenizer merges across the beginning of the piece.
        """
        if text not in self._known:
            ids, anchor = self.tokenizer.encode(_ANCHOR + text), self._anchor
            if ids[: len(anchor)] != anchor:
                raise DataError(
                    f"{self.tokenizer.path}: this tokenizer merges {_ANCHOR + text[:20]!r} into tokens across the "
                    "space or line break, so prompts cannot be put together from pieces; use the model's own tokenizer."
                )
            if len(self._known) > 10_000:  # random keys, of which each comes once
                self._known.clear()
            self._known[text] = ids[len(anchor) :]
        return self._known[text]


def answer_ids(encode: PieceEncoder, prompt: Prompt) -> list[int]:
    """Ids of the answer after the question, none if they are not those by which a statement spells it.

    Only then can a model answer by copying, token by token.
    """
    question = encode(prompt.question)
    whole = encode(prompt.question + prompt.answer)
    if whole[: len(question)] != question:
        return []
    answer = whole[len(question) :]
    for statement in prompt.statements:
        ids = encode(statement)
        if any(ids[at : at + len(answer)] == answer for at in range(len(ids) - len(answer) + 1)):
            return answer
    return []


def compose(
    encode: PieceEncoder, prompt: Prompt, filler: Filler, length: int, depths: Sequence[float], answer: Sequence[int]
) -> Case:
    """A window of exactly `length` tokens.

    Args:
        prompt: the words.
        filler: what they are hidden in; each stretch between two statements is asked for anew.
        length: tokens of the window, the answer included.
        depths: of each statement, ascending: the share of the filler that stands before it.
        answer: ids of the answer.

    Raises:
        DataError: the words alone are longer than `length`.
    """
    head = [*encode.tokenizer.prompt_start, *encode.tokenizer.encode(prompt.head)]
    statements = [encode(text) for text in prompt.statements]
    question = encode(prompt.question)
    room = length - len(head) - len(question) - len(answer) - sum(map(len, statements))
    if room < 0:
        raise DataError(
            f"Retrieval length {length}: the prompt without any filler has {length - room} tokens; use longer ones."
        )
    parts: list[Sequence[int] | NDArray[np.int64]] = [head]
    used = 0
    for depth, statement in zip(depths, statements, strict=True):
        until = max(round(depth * room), used)
        parts += [filler(until - used), statement]
        used = until
    parts += [filler(room - used), question, answer]
    tokens = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    assert len(tokens) == length, "fillers give what they are asked for"
    return Case(tokens, len(answer))
