"""Variable tracking: RULER's vt task, drawn as lm-evaluation-harness draws it (`vt_utils.py`)."""

from __future__ import annotations

import random
import string

import numpy as np

from parallel.errors import DataError
from pipeline.evaluation.ruler.sample import Count, Sample, first_fitting

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
# "assgined" is the harness's.
BEGUN = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {query}, they are: "
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
HOPS = 4
NEW = 30
"""Tokens a model may write."""
EXAMPLE_TOKENS = 500
"""Of the solved example before the question, at most."""


class Variables:
    """Draws prompts.

    Args:
        rng: of names and places.
        numbers: of values.
    """

    def __init__(self, rng: random.Random, numbers: np.random.RandomState) -> None:
        self._rng, self._numbers = rng, numbers

    def _name(self, letters: int) -> str:
        return "".join(self._rng.choices(string.ascii_uppercase, k=letters))

    def _chain(self, letters: int) -> tuple[list[str], list[str]]:
        names: list[str] = []
        while len(set(names)) < HOPS + 1:  # the harness fails where two names are drawn alike
            names = [self._name(letters) for _ in range(HOPS + 1)]
        chain = [f"VAR {names[0]} = {self._numbers.randint(10000, 99999)}"]
        return names, chain + [f"VAR {names[n + 1]} = VAR {names[n]} " for n in range(HOPS)]

    def draw(self, noises: int, letters: int = 5) -> tuple[str, str, list[str]]:
        """(question with its text, how the reply begins, answers), so many times the filler.

        Raises:
            ValueError: the filler is too short for the chain.
        """
        names, chain = self._chain(letters)
        sentences = [GRASS] * noises
        if len(sentences) <= len(chain):
            parts = [part for noise in sentences for part in noise.split(".")]
            sentences = [f"{part}." if part.strip() else part for part in parts]
        places = sorted(self._rng.sample(range(len(sentences)), len(chain)))
        for number, (place, link) in enumerate(zip(places, chain, strict=True)):
            sentences.insert(place + number, link)
        context = " ".join(sentences).replace(". \n", ".\n")
        value = chain[0].split("=")[-1].strip()
        return TEMPLATE.format(context=context, query=value), BEGUN.format(count=HOPS + 1, query=value), names

    def samples(self, tokens: Count, length: int, wanted: int) -> list[Sample]:
        """Prompts of at most `length` tokens, those to be written included, each after a solved example.

        Raises:
            DataError: the length, or RULER's example, has no room for a prompt.
        """
        try:
            question, begun, names = self._fitting(tokens, EXAMPLE_TOKENS, 5, 0, 1, letters=3)[0]
        except DataError:
            raise DataError(
                f"ruler_vt: this tokenizer needs more than {EXAMPLE_TOKENS} tokens for the solved example that RULER "
                "puts before each question; leave the task out."
            ) from None
        example = f"{question}{begun} {' '.join(names)}\n\n"
        found = []
        for question, begun, answers in self._fitting(tokens, length, 10, tokens(example), wanted, example=example):
            found.append(Sample(f"{question} {begun.strip()}", tuple(answers), NEW))
        return found

    def _fitting(
        self, tokens: Count, length: int, step: int, before: int, wanted: int, letters: int = 5, example: str = ""
    ) -> list[tuple[str, str, list[str]]]:
        """`wanted` draws of at most `length` tokens, with `before` of an example."""
        noises, used = step, 0
        while used + NEW + before < length:
            question, begun, names = self.draw(noises, letters)
            used = tokens(f"{question}{begun} {names}")
            if used + NEW + before > length:
                noises -= step
                break
            noises += step
        found = []
        for _ in range(wanted):
            drawn = first_fitting(
                lambda size: self.draw(size, letters),
                lambda drawn: tokens(drawn[0] + drawn[1]) + NEW + before <= length,
                noises,
                step,
            )
            if drawn is None:
                raise DataError(
                    f"RULER length {length}: has no room for variable tracking and its example; use a longer one."
                )
            question, begun, names = drawn
            found.append((self._solved(example) + "\n\n" + question if example else question, begun, names))
        return found

    def _solved(self, example: str) -> str:
        """The example with other names as its answer."""
        mark = BEGUN[-10:]
        for name in example[example.index(mark) + len(mark) :].strip().split():
            example = example.replace(name, self._name(len(name)))
        return example
