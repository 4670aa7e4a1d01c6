"""RULER's runs: what is written is greedy decoding's, ranks share the prompts, nothing is decoded twice or too far."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from parallel.axes.kv_cache import KeyValueCache
from parallel.world.grid import GridPlan
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.ruler.cost import ruler_cost
from pipeline.evaluation.ruler.results import RulerFile, RulerResult
from pipeline.evaluation.ruler.tasks import RulerSettings, ruler_cells
from pipeline.evaluation.run_ruler import Asked, evaluate_ruler
from pipeline.evaluation.spread import Shards
from pipeline.planning.arch import read_arch
from tests.support.data_helpers import BYTES
from tests.support.tiny_models import make_tiny
from tools.evaluate import main

TASKS = ("niah_single_1", "niah_multikey_2", "ruler_fwe")
CELLS = ruler_cells(RulerSettings(TASKS, (3000,), 5), BYTES, np.zeros(0, dtype=np.int64))


def toy(calls: list[int]) -> Callable[[Sequence[Sequence[int]], Asked], list[list[int]]]:
    """Writes the guess where the prompt's sum is even, half of it where not, and then dots to the end."""

    def decode(prompts: Sequence[Sequence[int]], asked: Asked) -> list[list[int]]:
        calls.append(len(prompts))
        written = []
        for row, (prompt, guess) in enumerate(zip(prompts, asked.guesses, strict=True)):
            plan = [*(guess if sum(prompt) % 2 == 0 else guess[: len(guess) // 2]), *BYTES.encode("." * asked.new)]
            ids: list[int] = []
            while len(ids) < asked.new:
                ids.append(plan[len(ids)])
                if asked.ended(row, ids):
                    break
            written.append(ids)
        return written

    return decode


def check(found: list[RulerResult]) -> None:
    for cell, result in zip(CELLS, found, strict=True):
        for sample, prompt, score, said in zip(cell.samples, cell.prompts, result.scores, result.written, strict=True):
            whole = " " + " ".join(sample.answers)
            if sum(prompt) % 2 == 0:
                assert score == 1 and said == whole, "it ends where all answers are there"
            else:
                begun = whole[: len(whole) // 2]
                assert said == begun + "." * (sample.new - len(begun)) and score < 1
    scores = [score for result in found for score in result.scores]
    assert 0 < sum(score == 1 for score in scores) < len(scores)


@pytest.mark.parametrize(("world", "most"), [(1, 1 << 15), (2, 7000), (3, 1)])
def test_ranks_share_the_prompts_and_find_what_one_finds(world: int, most: int) -> None:
    calls: list[list[int]] = [[] for _ in range(world)]
    tables: list[list[torch.Tensor]] = [[] for _ in range(world)]

    def run(rank: int, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[RulerResult]:
        shards = Shards(rank, world, reduce, lockstep=True)
        return evaluate_ruler(
            toy(calls[rank]), CELLS, {}, BYTES, known=RulerFile(None), shards=shards, most_tokens=most
        )

    def keep(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda table: (tables[rank].append(table.clone()), table)[1]

    for rank in range(world):
        run(rank, keep(rank))
    assert len({len(own) for own in calls}) == 1, "all run equally often"
    for rank in range(world):
        sums = iter([torch.stack(parts).sum(0) for parts in zip(*tables, strict=True)])
        check(run(rank, lambda table, sums=sums: next(sums)))  # type: ignore[misc]


def test_finished_cells_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cells.json"
    calls: list[int] = []
    first = evaluate_ruler(toy(calls), CELLS[:2], {"step": 1}, BYTES, known=RulerFile(path))
    spent = len(calls)
    again = evaluate_ruler(toy(calls), CELLS, {"step": 1}, BYTES, known=RulerFile(path))
    assert again[:2] == first and len(calls) == spent + 1, "one cell was new"
    check(again)
    evaluate_ruler(toy(calls), CELLS, {"step": 2}, BYTES, known=RulerFile(path))
    assert len(calls) == spent + 4, "another model has results of its own"


def test_what_is_written_is_what_generate_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parked: dict[int, int] = {}
    honest = KeyValueCache._allocate

    def allocate(self: KeyValueCache, layer: int, *rest: Any) -> torch.Tensor:
        found = honest(self, layer, *rest)
        parked[layer] = max(parked.get(layer, 0), found.nbytes)
        return found

    monkeypatch.setattr(KeyValueCache, "_allocate", allocate)
    base = make_tiny(tmp_path / "base", "smollm2", tokenizer=True, max_position_embeddings=1200, num_hidden_layers=1)
    (tmp_path / "val.txt").write_text(
        " ".join(random.Random(1).choices(["red.", "blue", "ship", "sea", "and"], k=2000))
    )
    given = ["--model", str(base), "--text", str(tmp_path / "val.txt"), "--output", str(tmp_path / "out")]
    asked = ["--tasks", "ruler_fwe,niah_single_2", "--lengths", "1600", "--depths", "2", "--trials", "1"]
    assert main([*given, *asked, "--set", "eval.prefill=600"]) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert "eval.lengths: 1600 exceed model.context 1200" in told.err
    assert told.err.count("warning: ") == 1, "nothing is said of training"
    assert "effective length 0 tokens: 85.6% or more over 2 tasks (RULER's threshold)" in " ".join(told.out.split())
    report = json.loads((tmp_path / "out" / "ruler-shipped.json").read_text())
    tokenizer = load_tokenizer(base)
    text = np.array(tokenizer.encode((tmp_path / "val.txt").read_text()), dtype=np.int64)
    cells = ruler_cells(RulerSettings(("niah_single_2", "ruler_fwe"), (1600,), 2), tokenizer, text)
    # Keys and values that waited are those that were told, which is an upper bound.
    cost = ruler_cost(cells, read_arch(base), GridPlan(1, 1, 1, 1), 4)
    assert 0.9 * cost.host < sum(parked.values()) <= cost.host and len(parked) == 1
    assert f"up to {cost.host / 2**30:.1f} GiB of host memory a rank" in " ".join(told.out.split())
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    by_task: dict[str, Any] = {cell["task"]: cell for cell in report["cells"]}
    for cell in cells:
        for prompt, sample, said in zip(cell.prompts, cell.samples, by_task[cell.task]["written"], strict=True):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                whole = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=sample.new,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_id,
                    pad_token_id=tokenizer.eos_id,
                )[0, len(prompt) :].tolist()
            assert said == tokenizer.decode([token for token in whole if token != tokenizer.eos_id])
    assert main([*given, "--tasks", "niah_single_9"]) == 2
    assert "'niah_single_9' is not one of perplexity, longppl, passkey, needle, ruler, niah_" in capsys.readouterr().err
    assert main([*given, "--tasks", "ruler", "--lengths", "300"]) == 2
    assert "RULER length 300: has no room" in capsys.readouterr().err
    monkeypatch.setattr("pipeline.evaluation.parked.host_left", lambda: (cost.host - 1, "this machine"))
    assert main([*given, *asked]) == 2
    assert "error: RULER: keys and values of 1 rank on " in (refused := capsys.readouterr().err)
    assert "this machine leaves 0.0 GiB; lower its lengths (eval.ruler_lengths, --lengths)" in refused
    assert main([*given, "--set", "eval.prefill=200"]) == 0, "less waits"
    monkeypatch.setattr("pipeline.evaluation.parked.host_left", lambda: (100, "this machine"))
    assert main([*given, "--set", "eval.prefill=200"]) == 2
    assert "error: eval.lengths: keys and values of 1 rank on " in capsys.readouterr().err


def test_the_cost_is_what_torch_counts(tmp_path: Path) -> None:
    """Reading: products of matrices as torch counts them in transformers' model, and the causal half of attention."""
    base = make_tiny(tmp_path / "base", "smollm2", num_hidden_layers=2)
    arch, model = read_arch(base), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model.eval()
    (cell,) = ruler_cells(RulerSettings(("ruler_fwe",), (3000,), 2), BYTES, np.zeros(0, dtype=np.int64))
    sizes = [len(prompt) for prompt in cell.prompts]
    reading = writing = 0.0
    for tokens in sizes:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
        by_kind = counted.get_flop_counts()["Global"]
        attention = sum(n for op, n in by_kind.items() if "attention" in str(op) or "bmm" in str(op))
        products = sum(by_kind.values()) - attention
        pairs = 4 * arch.head_dim * arch.heads * arch.layers
        reading += products + pairs * tokens * (tokens + 1) / 2
        writing += sum(products / tokens + pairs * (tokens + at) for _ in range(50) for at in range(50))
    cost = ruler_cost([cell], arch, GridPlan(1, 1, 1, 1), 4)
    assert (cost.prompts, cost.tokens) == (2, sum(sizes))
    assert cost.reading == pytest.approx(reading, rel=1e-3)
    assert cost.writing == pytest.approx(writing, rel=2e-2), "of what is written, all counts as the last token does"
    assert f"2 prompts of {sum(sizes):,} tokens (as many as 2.0 training steps have)" in cost.sentence(sum(sizes) // 2)
