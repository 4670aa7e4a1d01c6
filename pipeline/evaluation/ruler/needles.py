"""Needles in a haystack: RULER's niah tasks, drawn as lm-evaluation-harness draws them.

The order in which random numbers are taken is that of its `prepare_niah.py`, so that the same seed gives the same
prompts. Sentences are cut after `.`, `!` or `?`, where the harness asks nltk's trained model, which is a download.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel.errors import DataError
from pipeline.evaluation.ruler.sample import Count, Sample
from pipeline.evaluation.ruler.words import word_pairs

TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * n / 39) for n in range(40)]
"""Percent of the sentences, in essays."""
ORDER_SEED = 42
"""Of the order in which needles stand."""
NEW = 128
"""Tokens a model may write."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class NeedleTask:
    """What tells the niah tasks apart."""

    haystack: str
    """repeat (LongLoRA's sentences) | essay (the user's text) | needle (further needles)."""
    keys: str = "words"
    """words | uuids."""
    values: str = "numbers"
    """numbers | uuids."""
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1


TASKS = {
    "niah_single_1": NeedleTask("repeat"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", values="uuids"),
    "niah_multikey_1": NeedleTask("essay", key_count=4),
    "niah_multikey_2": NeedleTask("needle"),
    "niah_multikey_3": NeedleTask("needle", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleTask("essay", value_count=4),
    "niah_multiquery": NeedleTask("essay", key_count=4, query_count=4),
}


def sentences_of(text: str) -> list[str]:
    """A text's sentences, cut after `.`, `!` or `?`."""
    return _SENTENCE_END.split(text.strip())


def _drawn(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(word_pairs())


def _essay(
    words: Sequence[str], needles: Sequence[str], sentences: Callable[[str], list[str]], rng: random.Random
) -> str:
    text = sentences(" ".join(words))
    places = sorted(int(len(text) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
    edges = [0, *places, len(text)]
    parts = []
    for number in range(1, len(edges)):
        parts.append(" ".join(text[edges[number - 1] : edges[number]]))
        parts += needles[number - 1 : number]
    return " ".join(parts)


def _lines(task: NeedleTask, count: int, needles: Sequence[str], rng: random.Random) -> str:
    lines = [GRASS] * count
    if task.haystack == "needle":
        lines = [
            NEEDLE.format(kind=task.values, key=_drawn(task.keys, rng), value=_drawn(task.values, rng))
            for _ in range(count)
        ]
    for place, needle in zip(sorted(rng.sample(range(count), len(needles)), reverse=True), needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def draw(
    task: NeedleTask,
    count: int,
    essay: Sequence[str],
    rng: random.Random,
    sentences: Callable[[str], list[str]] = sentences_of,
) -> tuple[str, tuple[str, ...], str]:
    """One prompt of so many sentences (words, in an essay) of haystack.

    Returns:
        (question with its haystack, answers, how the reply begins).

    Raises:
        ValueError: more needles than sentences.
    """
    keys, values, needles = [], [], []
    for _ in range(task.key_count):
        keys.append(_drawn(task.keys, rng))
        values.append([_drawn(task.values, rng) for _ in range(task.value_count)])
        needles += [NEEDLE.format(kind=task.values, key=keys[-1], value=value) for value in values[-1]]
    random.Random(ORDER_SEED).shuffle(needles)
    if task.haystack == "essay":
        context = _essay(essay[:count], needles, sentences, rng)
    else:
        context = _lines(task, count, needles, rng)
    asked = rng.sample(range(task.key_count), task.query_count)
    queries = [keys[at] for at in asked]
    query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
    template, kind, verb = TEMPLATE, task.values, "are"
    if task.query_count * task.value_count == 1:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        kind, verb = kind[:-1], "is"
    begun = f"The special magic {kind} for {query} mentioned in the provided text {verb}"
    text = template.format(kind=kind, context=context, query=query)
    return text, tuple(value for at in asked for value in values[at]), begun


def samples(
    task: NeedleTask,
    tokens: Count,
    essay: Sequence[str],
    length: int,
    wanted: int,
    rng: random.Random,
    sentences: Callable[[str], list[str]] = sentences_of,
) -> list[Sample]:
    """Prompts of at most `length` tokens, those to be written included.

    Args:
        tokens: counts a text's tokens.
        essay: words of the user's text.
        wanted: prompts.
        sentences: cuts an essay.

    Raises:
        DataError: the length has no room for a prompt, or the text is shorter than it.
    """
    needles = task.key_count * task.value_count
    step = 500 if task.haystack == "essay" else 25 if length >= 4096 else 5
    size, used = max(step, needles), 0
    while used + NEW < length:
        text, answers, _ = draw(task, size, essay, rng, sentences)
        used = tokens(text + " ".join(answers))
        if used + NEW > length:
            size -= step
            break
        if task.haystack == "essay" and size > len(essay):
            raise DataError(
                f"Evaluation text: has {len(essay)} words, too few to hide a needle in {length} tokens of it; give a "
                "longer text, or lower the lengths."
            )
        size += step
    size = max(size, needles)
    found = []
    for _ in range(wanted):
        left = size
        while left > 0:
            try:
                text, answers, begun = draw(task, left, essay, rng, sentences)
            except ValueError:  # fewer sentences than needles
                left -= step
                continue
            if tokens(text) + NEW <= length:
                found.append(Sample(f"{text} {begun}", answers, NEW))
                break
            left -= step
    if len(found) < wanted:
        raise DataError(
            f"RULER length {length}: has no room for the prompt and {NEW} tokens of answer; use a longer one."
        )
    return found
