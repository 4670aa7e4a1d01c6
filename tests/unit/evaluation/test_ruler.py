"""RULER's prompts, answers and scores are lm-evaluation-harness's (`ruler_golden.py` says how those were made)."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import numpy as np
import pytest

from parallel.errors import ConfigError, DataError
from pipeline.config.evaluation import RULER_TASKS
from pipeline.evaluation.ruler.sample import TRIES, first_fitting
from pipeline.evaluation.ruler.score import string_match
from pipeline.evaluation.ruler.tasks import RulerSettings, counter, draw, ruler_cells
from pipeline.evaluation.ruler.words import WordPairs, word_pairs
from tests.support.data_helpers import BYTES, ByteTokenizer
from tests.unit.evaluation.ruler_golden import GOLDEN, SCORED, WANTED, essay, tokens_of

HARNESS = json.loads(GOLDEN.read_text(encoding="utf-8"))
TEXT = np.array(BYTES.encode(essay() * 2), dtype=np.int64)


@pytest.mark.parametrize("case", HARNESS["cases"], ids=lambda case: f"{case['task']}-{case['length']}")
def test_prompts_and_answers_are_the_harness_s(case: dict[str, Any]) -> None:
    found = draw(case["task"], lambda text: len(tokens_of(text)), essay().split(), case["length"], WANTED)
    if case["length"] == min(other["length"] for other in HARNESS["cases"] if other["task"] == case["task"]):
        assert found[0].prompt == HARNESS["whole"][case["task"]]
    assert [
        {
            "answers": list(sample.answers),
            "new": sample.new,
            "sha256": hashlib.sha256(sample.prompt.encode()).hexdigest(),
        }
        for sample in found
    ] == case["samples"]
    assert len({sample.prompt for sample in found}) == WANTED


def test_every_task_is_compared() -> None:
    assert {case["task"] for case in HARNESS["cases"]} == set(RULER_TASKS)


def test_answers_are_scored_as_the_harness_scores() -> None:
    assert [string_match(said, answers) for said, answers in SCORED] == HARNESS["scores"]
    assert 0 < sum(HARNESS["scores"]) < len(SCORED)


def test_word_pairs_are_sorted_as_strings() -> None:
    adjectives, nouns = ["blue", "blue-eyed", "big", "a", "bl", "blue"], ["eye", "f", "eyed-x", "sea", "ant"]
    pairs = WordPairs(adjectives, nouns)
    assert list(pairs) == sorted(f"{adjective}-{noun}" for adjective in set(adjectives) for noun in nouns)
    assert list(pairs).index("blue-eyed-ant") < list(pairs).index("blue-f"), "blocks mix"
    assert len(word_pairs()) == 910 * 6782


def test_prompts_fit_and_hold_their_answers() -> None:
    tasks = [task for task in RULER_TASKS if task != "ruler_vt"]  # bytes are too many tokens for its example
    settings = RulerSettings(tuple(tasks), (12000,), 2, seed=3)
    found = ruler_cells(settings, ByteTokenizer(prompt_start=(1,)), TEXT)
    assert [cell.task for cell in found] == tasks
    for cell in found:
        for sample, ids in zip(cell.samples, cell.prompts, strict=True):
            assert ids[0] == 1 and BYTES.decode(ids[1:]) == sample.prompt
            # As in the harness, which sizes fwe without the answer and niah without how the reply begins.
            over = {"ruler_fwe": sample.new, "ruler_cwe": 1}.get(cell.task, len(sample.prompt.rsplit("?", 1)[1]))
            assert 0.6 * cell.length < len(ids) + sample.new <= cell.length + over
            assert all(answer in sample.prompt for answer in sample.answers)
    other = ruler_cells(RulerSettings(tuple(tasks), (12000,), 2, seed=4), ByteTokenizer(prompt_start=(1,)), TEXT)
    assert all(a.prompts[0] != b.prompts[0] for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize("task", RULER_TASKS)
def test_a_length_without_room_is_one_sentence(task: str) -> None:
    for length in (40, 150):
        with pytest.raises(DataError, match=f"RULER length {length}: has no room.*use a longer one"):
            draw(task, lambda text: len(tokens_of(text)), essay().split(), length, 1)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(DataError, match="has 1000 tokens, fewer than a prompt of 2000; give a longer text, or lower"):
        ruler_cells(RulerSettings(("niah_single_2",), (2000,), 1), BYTES, TEXT[:1000])
    assert len(ruler_cells(RulerSettings(("niah_single_1",), (2000,), 1), BYTES, TEXT[:10])) == 1, "it reads no text"
    with pytest.raises(DataError, match="has 300 words, too few to hide a needle in 5000 tokens"):
        draw("niah_single_2", lambda text: len(tokens_of(text)), essay().split()[:300], 5000, 1)
    with pytest.raises(DataError, match="ruler_vt: this tokenizer needs more than 500 tokens for the solved example"):
        draw("ruler_vt", counter(BYTES), [], 5000, 1)
    with pytest.raises(ConfigError, match="'niah' is not one of niah_single_1"):
        RulerSettings(("niah",), (2000,), 1)
    with pytest.raises(ConfigError, match="lengths"):
        RulerSettings(RULER_TASKS, (), 1)


def test_the_random_numbers_are_spent_as_pythons_own() -> None:
    """`rng.choice` over pairs that are made on demand takes what it takes over a list of them."""
    small = WordPairs(["a", "b", "c"], ["x", "y"])
    assert [random.Random(n).choice(small) for n in range(9)] == [
        random.Random(n).choice(list(small)) for n in range(9)
    ]


@pytest.mark.parametrize(
    ("size", "room", "drawn"),
    [
        (30, 99, [30]),
        (30, 15, [30, 20, 10]),
        (30, 0, [30, 20, *[10] * (TRIES - 2)]),  # the smallest again and again: what is drawn differs
        (25, 5, [25, 15, 5]),
        (0, 99, []),
    ],
)
def test_draws_shrink_until_one_fits(size: int, room: int, drawn: list[int]) -> None:
    """The harness's rule: a step less while more than a step is left, a hundred draws at most."""
    asked: list[int] = []

    def draw_one(count: int) -> int:
        asked.append(count)
        return count

    found = first_fitting(draw_one, lambda count: count <= room, size, 10)
    assert asked == drawn
    assert found == (drawn[-1] if drawn and drawn[-1] <= room else None)
