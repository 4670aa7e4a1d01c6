"""RULER's tasks by name, and the prompts of a task and length."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError, DataError
from pipeline.config.evaluation import RULER_TASKS
from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.ruler import needles
from pipeline.evaluation.ruler.counting import CommonWords, FrequentWords
from pipeline.evaluation.ruler.sample import Count, Sample
from pipeline.evaluation.ruler.variables import Variables

NUMBERS_SEED = 1234
"""lm-evaluation-harness's of numpy, where its own is 0."""
SPARE = 8192
"""Tokens of text beyond a length that sizing an essay may look at."""


@dataclass(frozen=True)
class RulerSettings:
    """A grid of tasks and lengths."""

    tasks: tuple[str, ...]
    """Of `RULER_TASKS`."""
    lengths: tuple[int, ...]
    """Tokens of a prompt and what is written after it, at most."""
    trials: int
    """Prompts a task and length."""
    seed: int = 0
    """As lm-evaluation-harness's --seed."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in RULER_TASKS:
                raise ConfigError(f"tasks: {task!r} is not one of {', '.join(RULER_TASKS)}.")
        if not self.lengths or min(self.lengths) < 2 or self.trials < 1:
            raise ConfigError(f"lengths: {list(self.lengths)} and trials: {self.trials} must be at least 2 and 1.")


@dataclass(frozen=True)
class RulerCell:
    """The prompts of one task and length."""

    task: str
    length: int
    samples: tuple[Sample, ...]
    prompts: tuple[tuple[int, ...], ...]
    """Token ids, BOS included where the tokenizer puts one."""


def counter(tokenizer: TextTokenizer) -> Count:
    """Counts tokens as a prompt."""
    return lambda text: len(tokenizer.prompt_start) + len(tokenizer.encode(text))


def essay_words(tokenizer: TextTokenizer, text_T: NDArray[np.int64], length: int) -> list[str]:
    """Words of the beginning of a text, enough for prompts of `length`.

    Args:
        text_T: int64 [T].

    Raises:
        DataError: the text is shorter than `length`.
    """
    if len(text_T) < length:
        raise DataError(
            f"Evaluation text: has {len(text_T)} tokens, fewer than a prompt of {length}; give a longer text, or lower "
            "the lengths."
        )
    return re.sub(r"\s+", " ", tokenizer.decode(text_T[: length + SPARE].tolist())).split(" ")


def draw(task: str, tokens: Count, essay: list[str], length: int, wanted: int, seed: int = 0) -> list[Sample]:
    """The first `wanted` prompts that lm-evaluation-harness makes of one task and length, asked for nothing else.

    Args:
        essay: words of the haystack; read by tasks that hide needles in a text.

    Raises:
        DataError: the length has no room for a prompt, or the essay is too short.
    """
    rng = random.Random(seed)
    if task in needles.TASKS:
        return needles.samples(needles.TASKS[task], tokens, essay, length, wanted, rng)
    if task == "ruler_vt":
        return Variables(rng, np.random.RandomState(NUMBERS_SEED + seed)).samples(tokens, length, wanted)
    kind = CommonWords if task == "ruler_cwe" else FrequentWords
    return kind(rng).samples(tokens, length, wanted)


def ruler_cells(settings: RulerSettings, tokenizer: TextTokenizer, text_T: NDArray[np.int64]) -> list[RulerCell]:
    """Every cell, short lengths first; the same for every model of one tokenizer.

    Args:
        text_T: int64 [T], held-out text: the haystack of essays.

    Raises:
        DataError: a length has no room for a prompt, or the text is too short.
    """
    tokens, found = counter(tokenizer), []
    for length in sorted(set(settings.lengths)):
        essay: list[str] = []
        for task in settings.tasks:
            hides = task in needles.TASKS and needles.TASKS[task].haystack == "essay"
            if hides and not essay:
                essay = essay_words(tokenizer, text_T, length)
            samples = draw(task, tokens, essay, length, settings.trials, settings.seed)
            prompts = tuple((*tokenizer.prompt_start, *tokenizer.encode(sample.prompt)) for sample in samples)
            found.append(RulerCell(task, length, tuple(samples), prompts))
    return found
