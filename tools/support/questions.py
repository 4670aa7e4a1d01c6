"""Questions that a long text answers, made from any prose: which sentence, far above, begins with these words?

The answer is a sentence of the text itself, so it can be checked by comparing strings, and nobody has to know the book.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, DataError
from pipeline.data.records import RecordReader

BEGINS = 4
"""Words of the sentence that the question quotes, and the answer begins with: a small model copies them, and then goes
on as it has read."""
FAR = 0.4
"""Share of the passage, from its beginning, in which the sentence stands: the question comes after the rest."""
FEWEST = 400
"""Characters of a passage; a shorter one has no distance in it."""
QUESTION = 'Which sentence of the text above begins with "{begin}"? Answer with the whole sentence, as it stands there.'
_WORD = r"[^\s.!?\"“”()*_]+"
_SENTENCE = re.compile(rf"(?:^|(?<=[.!?] )|(?<=\n))([A-Z]{_WORD}(?: {_WORD}){{{BEGINS + 1},13}}[.!?])(?=\s|$)")
"""Six to fourteen words, without quotes, up to the first mark that may end a sentence."""
_SHORT = ("Mr.", "Mrs.", "Dr.", "St.", "Capt.", "Col.", "Lady.")
"""Words whose full stop ends no sentence."""


@dataclass(frozen=True)
class Question:
    """One item."""

    passage: str
    question: str
    answer: str

    def record(self) -> dict[str, Any]:
        """As `tools.prepare_data --chat` takes it."""
        asked = {"role": "user", "content": f"{self.passage}\n\n{self.question}"}
        return {"messages": [asked, {"role": "assistant", "content": self.answer}]}


def passages(paragraphs: Iterable[str], characters: int) -> Iterator[str]:
    """Whole paragraphs, of at least `characters` together, white space within a paragraph made one blank."""
    held: list[str] = []
    length = 0
    for paragraph in paragraphs:
        words = " ".join(paragraph.split())
        if not words:
            continue
        held.append(words)
        length += len(words) + 2
        if length >= characters:
            yield "\n\n".join(held)
            held, length = [], 0


def questions_about(passage: str, rng: random.Random, most: int = 1) -> list[Question]:
    """No more than so many questions, each on a sentence near the beginning of the passage."""
    found = [match.group(1) for match in _SENTENCE.finditer(passage) if match.end(1) < len(passage) * FAR]
    rng.shuffle(found)
    made: list[Question] = []
    for sentence in found:
        begin = " ".join(sentence.split(" ")[:BEGINS])
        # A beginning that comes twice has two answers.
        if len(made) < most and passage.count(begin) == 1 and not sentence.endswith(_SHORT):
            made.append(Question(passage, QUESTION.format(begin=begin), sentence))
    return made


def questions(texts: Path, count: int, characters: int, seed: int, each: int = 1) -> list[Question]:
    """So many questions, drawn from all of the text.

    Args:
        texts: what `data.path` takes.
        characters: of a passage, at least; the paragraph that reaches them is taken whole.
        seed: of what is drawn.
        each: questions on one passage, at most.

    Raises:
        ConfigError: a passage would be too short.
        DataError: the text cannot be read, or holds too few passages that can be asked about.
    """
    if characters < FEWEST:
        raise ConfigError(f"--characters: {characters} leaves no distance to the question; use {FEWEST} or more.")
    rng = random.Random(seed)
    made: list[Question] = []
    for document in RecordReader(texts):
        # A paragraph longer than half as much again would make one passage far longer than the others.
        whole = [part for part in re.split(r"\n\s*\n", document.text) if len(part) <= characters // 2]
        for passage in passages(whole, characters):
            made += questions_about(passage, rng, each)
    if len(made) < count:
        raise DataError(
            f"{texts}: gives {len(made)} questions on passages of {characters} characters and {count} are wanted; give "
            "more text, raise --each, or lower --count or --characters."
        )
    return rng.sample(made, count)


@dataclass(frozen=True)
class Score:
    """How many answers are right, of `asked`."""

    asked: int
    exact: int
    """The very words and nothing else."""
    held: int
    """The words somewhere in what was answered."""


def scored(answers: Sequence[str], right: Sequence[str]) -> Score:
    """Compare answers with the right ones; white space at both ends does not count."""
    pairs = list(zip(answers, right, strict=True))
    return Score(
        len(pairs),
        sum(answer.strip() == wanted.strip() for answer, wanted in pairs),
        sum(wanted.strip() in answer for answer, wanted in pairs),
    )
