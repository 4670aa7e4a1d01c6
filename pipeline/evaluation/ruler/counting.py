"""Common and frequent words: RULER's cwe and fwe tasks, drawn as lm-evaluation-harness draws them (`cwe_utils.py`,
`fwe_utils.py`)."""

from __future__ import annotations

import math
import random
import string

import numpy as np

from parallel.errors import DataError
from pipeline.evaluation.ruler.sample import Count, Sample, first_fitting
from pipeline.evaluation.ruler.words import all_words

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_BEGUN = " Answer: The top 10 words that appear most often in the list are:"
COMMON, COMMON_NEW = 10, 120
FREQUENT_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FREQUENT_BEGUN = " Answer: According to the coded text above, the three most frequently appeared words are:"
FREQUENT_NEW, LETTERS = 50, 6
ORDER_SEED = 42


class CommonWords:
    """Draws lists in which ten words are common.

    Args:
        rng: of the words.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._order = rng, random.Random(ORDER_SEED)
        self._words = list(all_words())
        self._order.shuffle(self._words)

    def _list(self, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = self._rng.sample(self._words, count)
        whole = words[:COMMON] * often + words[COMMON:] * seldom
        self._order.shuffle(whole)
        return " ".join(f"{n + 1}. {word}" for n, word in enumerate(whole)), words[:COMMON]

    def draw(self, count: int, length: int) -> tuple[str, str, list[str]]:
        """(solved example, question with its list of so many different words, answers).

        Raises:
            ValueError: there are not so many words.
        """
        short = length < 4096
        example, solved = self._list(*((20, 3, 1) if short else (40, 10, 3)))
        context, answers = self._list(count, *((6, 1) if short else (30, 3)))
        whole = COMMON_TEMPLATE + COMMON_BEGUN
        numbered = " ".join(f"{n + 1}. {word}" for n, word in enumerate(solved))
        # The harness makes the example, counts it, and asks without it.
        return whole.format(context=example) + numbered, COMMON_TEMPLATE.format(context=context), answers

    def samples(self, tokens: Count, length: int, wanted: int) -> list[Sample]:
        """Prompts of at most `length` tokens, those to be written included.

        Raises:
            DataError: the length has no room for a prompt.
        """
        step = count = 10
        used = 0
        while used + COMMON_NEW < length:
            example, question, answers = self.draw(count, length)
            numbered = " ".join(f"{n + 1}. {word}" for n, word in enumerate(answers))
            used = tokens(f"{example}\n{question}{COMMON_BEGUN} {numbered}")
            if used + COMMON_NEW > length:
                count -= step
                break
            count += step
            if count > len(self._words):
                count = len(self._words)
                break
        found = []
        for _ in range(wanted):
            drawn = first_fitting(
                lambda size: self.draw(size, length),
                lambda drawn: tokens(drawn[1] + COMMON_BEGUN) + COMMON_NEW <= length,
                count,
                step,
            )
            # Fewer than ten words have no ten common ones.
            if drawn is None:
                raise DataError(f"RULER length {length}: has no room for a list of common words; use a longer one.")
            _, question, answers = drawn
            found.append(Sample(f"{question.strip()}\n\n{COMMON_BEGUN.strip()}", tuple(answers), COMMON_NEW))
        return found


class FrequentWords:
    """Draws coded texts whose words' frequencies follow a zeta distribution of exponent 2.

    Args:
        rng: of the words.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def _word(self) -> str:
        return "".join(self._rng.choices(string.ascii_lowercase, k=LETTERS))

    def _vocabulary(self, size: int) -> list[str]:
        words = [self._word() for _ in range(size)]
        while len(set(words)) < size:
            words.append(self._word())
        words = sorted(set(words))
        random.Random(ORDER_SEED).shuffle(words)
        words[0] = "..."  # the most frequent is noise
        return words

    @staticmethod
    def _text(words: list[str], count: int) -> str:
        ranks = np.arange(1, len(words) + 1)
        counts = (count * (ranks**-2.0) / (math.pi**2 / 6)).astype(int)
        whole = [word for word, times in zip(words, counts, strict=True) for word in [word] * times]
        random.Random(ORDER_SEED).shuffle(whole)
        return FREQUENT_TEMPLATE.format(context=" ".join(whole))

    def samples(self, tokens: Count, length: int, wanted: int) -> list[Sample]:
        """Prompts of at most `length` tokens; as in the harness, those to be written come on top.

        Raises:
            DataError: the length has no room for a prompt.
        """
        step, size = length // 32, length // 50
        if size < 4:
            raise DataError(f"RULER length {length}: has no room for three frequent words; use a longer one.")

        def fits(text: str, over: bool) -> bool:
            used = tokens(text + FREQUENT_BEGUN)
            return used <= length if over else used < length

        words, count = self._vocabulary(size), length // LETTERS
        while fits(self._text(words, count), over=False):
            count += step
        count -= step
        found = []
        for _ in range(wanted):
            words, left = self._vocabulary(size), count
            while left > 0 and not fits(self._text(words, left), over=True):
                left -= step
            text = self._text(words, left) if left > 0 else ""
            if any(word not in text for word in words[1:4]):
                raise DataError(f"RULER length {length}: has no room for three frequent words; use a longer one.")
            found.append(Sample(f"{text.strip()} {FREQUENT_BEGUN.strip()}", tuple(words[1:4]), FREQUENT_NEW))
        return found
