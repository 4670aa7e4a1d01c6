"""Retrieval prompts and their bookkeeping: exact lengths, the published words, every rank alike, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.errors import ConfigError, DataError
from pipeline.data.packing import IGNORE
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.evaluation.prompts import PieceEncoder
from pipeline.evaluation.results import CellResult, ResultFile, by_length, cell_key, lost_and_won, standard_error
from pipeline.evaluation.retrieval import evaluate_retrieval
from pipeline.evaluation.spread import Shards
from pipeline.evaluation.tasks import Cell, RetrievalSettings, cells
from tests.support.data_helpers import BYTES
from tests.unit.data.test_tokenizer import write_hf, write_sentencepiece

TEXT = np.array(
    BYTES.encode("The sea was calm, and nobody on the ship had seen a whale for days. " * 100), dtype=np.int64
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def text_of(ids: np.ndarray) -> str:
    return bytes(int(token) - 3 for token in ids).decode()


@pytest.fixture(scope="module", params=["hf", "sentencepiece", "sentencepiece-digits"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "hf":
        return load_tokenizer(write_hf(folder / "hf"))
    digits = {"split_digits": True} if "digits" in request.param else {}
    return load_tokenizer(write_sentencepiece(folder / "tokenizer.model", **digits))


def published_passkey(before: int, after: int, key: str) -> str:
    """LongLoRA's generate_prompt_landmark for so many characters of filler, as its script joins it."""
    endless = " ".join([GRASS] * 500)
    return "\n".join(
        [
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz "
            "you about the important information there.",
            endless[:before],
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            endless[:after],
            "What is the pass key? The pass key is",
        ]
    )


@pytest.mark.parametrize("depth", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("digits", [3, 5, 9])
def test_passkey_is_the_published_prompt(depth: float, digits: int) -> None:
    settings = RetrievalSettings((900, 2000), (depth,), 3, digits=digits)
    for cell in cells(settings, BYTES, TEXT):
        for case in cell.cases:
            assert len(case.tokens) == cell.length
            whole = text_of(case.tokens)
            key = whole[-digits:]
            assert case.answer == digits + 1 and whole[-digits - 1] == " "
            assert key.isdigit() and key[0] != "0"
            fixed = len(published_passkey(0, 0, key))
            # Bytes are tokens here, so that the filler's characters are known; its line break counts to the filler.
            room = cell.length - fixed - digits - 1 + 2
            before = round(depth * room)
            assert whole == published_passkey(before - 1, room - before - 1, key) + f" {key}"


def test_prompts_differ_by_trial_and_seed_and_not_by_what_else_is_asked() -> None:
    one = list(cells(RetrievalSettings((900,), (0.5,), 4), BYTES, TEXT))[0]
    assert len({case.tokens.tobytes() for case in one.cases}) == 4
    among = list(cells(RetrievalSettings((700, 900), (0.0, 0.5), 6), BYTES, TEXT))
    (same,) = [cell for cell in among if (cell.length, cell.depth) == (900, 0.5)]
    assert [c.tokens.tolist() for c in same.cases[:4]] == [c.tokens.tolist() for c in one.cases]
    other = list(cells(RetrievalSettings((900,), (0.5,), 4, seed=1), BYTES, TEXT))[0]
    assert one.cases[0].tokens.tolist() != other.cases[0].tokens.tolist()


def test_needle_hides_in_the_users_own_text() -> None:
    (cell,) = cells(RetrievalSettings((1500,), (0.5,), 2, task="needle", filler="text", digits=7), BYTES, TEXT)
    whole, source = text_of(cell.cases[0].tokens), text_of(TEXT)
    head, before, statement, after, question = whole.split("\n")
    assert before in source and after in source and len(before) + len(after) > 1000
    assert abs(len(before) - len(after)) <= 1
    thing, number = statement.removeprefix("One of the special magic numbers for ").rstrip(".").split(" is: ")
    assert question.endswith(f"The special magic number for {thing} mentioned in the provided text is {number}")
    assert cell.cases[0].tokens.tolist() != cell.cases[1].tokens.tolist()


def test_every_tokenizer_gives_exact_lengths_and_copyable_answers(tokenizer: TextTokenizer) -> None:
    for settings in (
        RetrievalSettings((700, 1001), (0.0, 0.5, 1.0), 2),
        RetrievalSettings((700,), (0.5,), 2, task="needle", filler="text"),
    ):
        text = np.array(tokenizer.encode("the sea and the ship " * 400), dtype=np.int64)
        for cell in cells(settings, tokenizer, text):
            for case in cell.cases:
                assert len(case.tokens) == cell.length
                start = len(tokenizer.prompt_start)
                assert case.tokens[:start].tolist() == tokenizer.prompt_start
                answer = case.tokens[-case.answer :].tolist()
                rest = case.tokens[: -case.answer].tolist()
                assert any(rest[at : at + len(answer)] == answer for at in range(len(rest)))


def test_a_piece_is_tokenized_as_in_a_document(tokenizer: TextTokenizer) -> None:
    """The pieces' ids together are those of the joined text."""
    encode = PieceEncoder(tokenizer)
    pieces = ["\nThe pass key is 12345.", "\nWhat is the pass key?", " The pass key is"]
    joined = tokenizer.encode("the sea" + "".join(pieces))
    assert tokenizer.encode("the sea") + [token for piece in pieces for token in encode(piece)] == joined


class OddDigits:
    """Writes the digit that ends a text otherwise than elsewhere: as where it merges with the full stop behind it."""

    path, prompt_start = Path("odd-tokenizer"), ()

    def encode(self, text: str) -> list[int]:
        return BYTES.encode("".join("\x01" if c.isdigit() and not text.endswith(c) else c for c in text))


class Merging:
    """Joins a letter with the line break behind it."""

    path, prompt_start = Path("merging-tokenizer"), ()

    def encode(self, text: str) -> list[int]:
        return BYTES.encode(text.replace("x\n", "\x01"))


def test_bad_input_is_one_sentence() -> None:
    def first(settings: RetrievalSettings, tokenizer: object = BYTES, text: np.ndarray = TEXT) -> None:
        next(cells(settings, tokenizer, text))  # type: ignore[arg-type]

    with pytest.raises(DataError, match=r"length 50: the prompt without any filler has 2\d\d tokens; use longer"):
        first(RetrievalSettings((50,)))
    with pytest.raises(DataError, match="has 100 tokens, fewer than a prompt of 900; give a longer.*filler: grass"):
        first(RetrievalSettings((900,), task="needle", filler="text"), text=TEXT[:100])
    with pytest.raises(
        DataError, match=r"odd-tokenizer: this tokenizer splits a number such as \d otherwise.*of digits"
    ):
        first(RetrievalSettings((900,), digits=1), OddDigits())
    with pytest.raises(DataError, match="merging-tokenizer: this tokenizer merges"):
        first(RetrievalSettings((900,)), Merging())
    for wrong in ({"task": "passkeys"}, {"filler": "gras"}, {"digits": 0}, {"trials": 0}, {"depths": (1.5,)}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RetrievalSettings((900,), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lengths"):
        RetrievalSettings(())


GRID = RetrievalSettings((600, 900), (0.0, 0.5, 1.0), 3, digits=4)


def toy(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Misses an answer's last token where the window's sum is divisible by 3, and its first where by 2."""
    labels = labels_BS[:, :-1]
    scored = labels != IGNORE
    assert torch.equal(tokens_BS[:, 1:][scored], labels[scored])
    hits = scored.clone()
    for row, total in enumerate(tokens_BS.sum(1).tolist()):
        where = scored[row].nonzero()[:, 0]
        hits[row, where[-1]] = total % 3 != 0
        hits[row, where[0]] = total % 2 != 0
    return scored * tokens_BS[:, 1:].float(), hits


def expected(grid: list[Cell]) -> list[list[float]]:
    return [
        [float(total % 3 != 0 and total % 2 != 0) for total in (c.tokens.sum() for c in cell.cases)] for cell in grid
    ]


@pytest.mark.parametrize("most", [1, 1500, 1 << 15])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_together_find_what_one_finds_and_run_equally_often(world: int, most: int) -> None:
    grid = list(cells(GRID, BYTES, TEXT))
    calls, tables = [0] * world, []

    def run(rank: int, reduce: object) -> list[CellResult]:
        def score(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            calls[rank] += 1
            assert tokens.numel() <= max(most, tokens.shape[1])
            return toy(tokens, labels)

        shards = Shards(rank, world, reduce, lockstep=True)  # type: ignore[arg-type]
        return evaluate_retrieval(score, grid, {}, known=ResultFile(None), shards=shards, most_tokens=most)

    for rank in range(world):
        tables.append([])
        run(rank, lambda table, rank=rank: tables[rank].append(table.clone()) or table)
    assert len(set(calls)) == 1
    for rank in range(world):
        sums = iter([torch.stack(parts).sum(0) for parts in zip(*tables, strict=True)])
        found = run(rank, lambda table, sums=sums: next(sums))
        assert [list(cell.scores) for cell in found] == expected(grid)
        assert [list(cell.begun) for cell in found] == [
            [float(c.tokens.sum() % 3 != 0) for c in cell.cases] for cell in grid
        ]
        assert [cell.nll[1] for cell in found] == [
            pytest.approx(cell.cases[1].tokens[-5:].mean(), rel=1e-6) for cell in grid
        ]
    assert 0 < sum(map(sum, expected(grid))) < len(grid) * 3


def test_finished_cells_are_kept_and_others_are_not_mistaken_for_them(tmp_path: Path) -> None:
    grid, path, calls = list(cells(GRID, BYTES, TEXT)), tmp_path / "a" / "cells.json", []

    def dying(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tokens.shape)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return toy(tokens, labels)

    def go(model: dict[str, int], most: int = 2700) -> list[CellResult]:
        return evaluate_retrieval(dying, grid, model, known=ResultFile(path), most_tokens=most)

    with pytest.raises(KeyboardInterrupt):
        go({"step": 1})
    kept = len(json.loads(path.read_text())["cells"])
    assert 0 < kept < len(grid)
    found, spent = go({"step": 1}), len(calls)
    assert [list(cell.scores) for cell in found] == expected(grid)
    assert go({"step": 1}) == found and len(calls) == spent, "nothing is computed twice"
    assert go({"step": 2}) == found and len(calls) > spent, "another model has results of its own"
    other = list(cells(RetrievalSettings(GRID.lengths, GRID.depths, 3, digits=4, seed=9), BYTES, TEXT))
    assert {cell_key({}, cell) for cell in other}.isdisjoint(cell_key({}, cell) for cell in grid)
    path.write_text('{"cells": {"a": {"task": "x"}}}')
    with pytest.raises(DataError, match="cells.json: does not hold retrieval results.*move it away"):
        ResultFile(path)


def test_losses_against_the_base_are_told_in_words() -> None:
    def result(length: int, *scores: float) -> CellResult:
        return CellResult("passkey", length, 0.5, scores, tuple(0.0 for _ in scores), scores)

    base = [result(100, 1, 1, 1, 1), result(200, 0, 0), result(400, 0, 0)]
    said = lost_and_won([result(100, 1, 0, 0, 0), result(200, 1, 1), result(400, 1, 1)], base, 200)
    assert said == [
        "passkey at 100 tokens: 25% where the base has 100% (4 prompts): retrieval that the base had is lost.",
        "passkey at 200 tokens: the base scores 0 here: nothing to lose or win.",
    ]
    assert by_length([result(100, 1, 0), result(100, 1, 1)]) == {100: (0.75, 4)}
    assert standard_error([1, 0, 0, 1]) == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)
    assert standard_error([1]) is None
