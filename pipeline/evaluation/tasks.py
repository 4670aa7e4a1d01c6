"""What retrieval is asked: LongLoRA's passkey and a needle in the user's own text, over lengths and depths."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError, DataError
from pipeline.config.evaluation import RETRIEVAL_TASKS as TASKS
from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.prompts import Case, Filler, PieceEncoder, Prompt, answer_ids, compose

FILLERS = ("grass", "text")
"""grass: LongLoRA's sentences, over and over; text: the held-out text."""
REDRAWS = 20
"""Keys drawn at most for one the tokenizer spells alike everywhere."""

# LongLoRA, passkey_retrivial.py: the words of the task, of the filler, and of the question.
_PASSKEY_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
_GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# RULER's single needle (arXiv 2404.06654, niah_single_2).
_NEEDLE_HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards."
)
_THINGS = "amber basil cedar delta ember fable grove hazel ivory jumbo karma lemon maple noble olive pearl".split()


@dataclass(frozen=True)
class RetrievalSettings:
    """A grid of lengths and depths, so many prompts in each cell."""

    lengths: tuple[int, ...]
    """Tokens of a window, prompt and answer together."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the filler before the statement, in [0, 1]."""
    trials: int = 4
    """Prompts a cell."""
    task: str = "passkey"
    """passkey | needle."""
    filler: str = "grass"
    """grass | text."""
    digits: int = 5
    """Of the key."""
    seed: int = 0
    """Of keys and of where the filler begins."""

    def __post_init__(self) -> None:
        for name, value, allowed in (("task", self.task, TASKS), ("filler", self.filler, FILLERS)):
            if value not in allowed:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}.")
        if not self.lengths or min(self.lengths) < 2:
            raise ConfigError(f"lengths: {list(self.lengths)} are not lengths of windows; give tokens, e.g. 4096.")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths: {list(self.depths)} do not all lie in [0, 1].")
        if self.trials < 1 or not 1 <= self.digits <= 18:
            raise ConfigError(f"trials: {self.trials} must be at least 1, and digits {self.digits} lie in [1, 18].")

    @property
    def name(self) -> str:
        """E.g. passkey, needle-text-7."""
        return "-".join([self.task, self.filler, str(self.digits)])


@dataclass(frozen=True)
class Cell:
    """The prompts of one length and depth."""

    task: str
    length: int
    depth: float
    cases: tuple[Case, ...]


def repeated(encode: PieceEncoder, text: str) -> Filler:
    """`text` over and over, each stretch beginning with it on a line of its own."""
    first, again = encode("\n" + text), encode(" " + text)

    def filler(count: int) -> Sequence[int]:
        return (first + again * max(0, -(-(count - len(first)) // len(again))))[:count]

    return filler


def stretches(encode: PieceEncoder, tokens_T: NDArray[np.int64], length: int, start: random.Random) -> Filler:
    """A stretch of the user's text from a random place on; what is asked for next goes on from there.

    Args:
        tokens_T: int64 [T].
        length: of the window, which the text must be as long as.

    Raises:
        DataError: the text is shorter.
    """
    if len(tokens_T) < length:
        raise DataError(
            f"Evaluation text: has {len(tokens_T)} tokens, fewer than a prompt of {length}; give a longer text, "
            "lower the lengths, or use filler: grass."
        )
    at = start.randrange(len(tokens_T) - length + 1)
    line = encode("\n")

    def filler(count: int) -> NDArray[np.int64]:
        nonlocal at
        begin, at = at, at + count
        found = tokens_T[begin:at].copy()
        found[: len(line)] = line[:count]
        return found

    return filler


def _passkey(key: str, rng: random.Random) -> Prompt:
    return Prompt(
        _PASSKEY_HEAD,
        (f"\nThe pass key is {key}. Remember it. {key} is the pass key.",),
        "\nWhat is the pass key? The pass key is",
        f" {key}",
    )


def _needle(key: str, rng: random.Random) -> Prompt:
    thing = f"{rng.choice(_THINGS)}-{rng.choice(_THINGS)}"
    return Prompt(
        _NEEDLE_HEAD,
        (f"\nOne of the special magic numbers for {thing} is: {key}.",),
        f"\nWhat is the special magic number for {thing} mentioned in the provided text? The special magic number for "
        f"{thing} mentioned in the provided text is",
        f" {key}",
    )


_WORDS: dict[str, Callable[[str, random.Random], Prompt]] = {"passkey": _passkey, "needle": _needle}


def _drawn(encode: PieceEncoder, settings: RetrievalSettings, rng: random.Random) -> tuple[Prompt, list[int]]:
    """A prompt with a random key, and the ids of its answer."""
    for _ in range(REDRAWS):
        key = str(rng.randrange(10 ** (settings.digits - 1), 10**settings.digits))
        prompt = _WORDS[settings.task](key, rng)
        if answer := answer_ids(encode, prompt):
            return prompt, answer
    raise DataError(
        f"{encode.tokenizer.path}: this tokenizer splits a number such as {key} otherwise in the text than in the "
        "answer, so an exact match by tokens would not measure retrieval; use another number of digits."
    )


def cells(settings: RetrievalSettings, tokenizer: TextTokenizer, text_T: NDArray[np.int64]) -> Iterator[Cell]:
    """Every cell of the grid, short lengths first; the same prompts for every model of one tokenizer.

    Args:
        text_T: int64 [T], held-out text; only filler `text` looks at it.

    Raises:
        DataError: a length is too short for the words, the text is shorter than a length, or the tokenizer does not
            spell a number alike everywhere.
    """
    encode = PieceEncoder(tokenizer)
    for length in sorted(set(settings.lengths)):
        for depth in settings.depths:
            found = []
            for trial in range(settings.trials):
                # Its own generator each: the prompts of a cell do not depend on which others are asked for.
                rng = random.Random(f"{settings.seed}/{settings.name}/{length}/{depth}/{trial}")
                prompt, answer = _drawn(encode, settings, rng)
                grass = settings.filler == "grass"
                filler = repeated(encode, _GRASS) if grass else stretches(encode, text_T, length, rng)
                found.append(compose(encode, prompt, filler, length, (depth,), answer))
            yield Cell(settings.name, length, depth, tuple(found))
