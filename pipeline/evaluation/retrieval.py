"""Retrieval by greedy exact match: one teacher-forced forward a prompt, on any grid and engine that trains.

The answer is given to the model behind the prompt. Greedy decoding gives exactly this answer if and only if every
token of it is the arg max after the right tokens before it: the first wrong token is the first place where decoding
leaves the answer. So no key-value cache and no generation is needed.

Shapes: B windows in a forward, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.packing import IGNORE
from pipeline.evaluation.prompts import Case
from pipeline.evaluation.results import CellResult, ResultFile, cell_key
from pipeline.evaluation.spread import Shards, rounds
from pipeline.evaluation.tasks import Cell
from pipeline.planning.stream import TOGETHER

TokenScores = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(tokens, labels: int64 [B, S]) -> (nll fp32 [B, S - 1], hits bool [B, S - 1]): `RankModel.token_scores`."""

COLUMNS = 3
"""Figures of a prompt: see `score_cases`."""


def score_cases(score: TokenScores, cases: Sequence[Case]) -> torch.Tensor:
    """Of each answer, fp64 [B, 3]: whether it is greedy decoding's, whether the rest of it is once its first token is
    given, and the mean of its tokens' losses in nats.

    Args:
        cases: B windows of one length.
    """
    tokens = torch.from_numpy(np.stack([case.tokens for case in cases]))
    labels = torch.full_like(tokens, IGNORE)
    for row, case in enumerate(cases):
        labels[row, -case.answer - 1 : -1] = tokens[row, -case.answer :]
    nll, hits = score(tokens, labels)
    nll, hits = nll.double().cpu(), hits.cpu()
    found = torch.zeros(len(cases), COLUMNS, dtype=torch.float64)
    for row, case in enumerate(cases):
        right = hits[row, -case.answer :]
        found[row, 0] = float(right.all())
        # With a single token nothing is left to be given.
        found[row, 1] = float(right[1:].all()) if case.answer > 1 else found[row, 0]
        found[row, 2] = nll[row, -case.answer :].mean()
    return found


def _rounds(cells: Mapping[int, Cell], world: int, most_tokens: int) -> Iterator[list[Sequence[tuple[int, int]]]]:
    """Windows, as (cell, case), of one length in batches, short lengths first; see `rounds`."""
    for length in sorted({cell.length for cell in cells.values()}):
        windows = [(n, m) for n, cell in cells.items() if cell.length == length for m in range(len(cell.cases))]
        yield from rounds(windows, world, most_tokens // length)


def evaluate_retrieval(
    score: TokenScores,
    cells: Sequence[Cell],
    model: Mapping[str, Any],
    *,
    known: ResultFile,
    shards: Shards | None = None,
    device: torch.device | None = None,
    most_tokens: int = TOGETHER,
    on_windows: Callable[[int], None] = lambda count: None,
) -> list[CellResult]:
    """Results of every cell, in the order of `cells`; those in `known` are not computed again. Alike on every rank.

    Args:
        score: the model under full attention.
        cells: see `tasks.cells`; the same on every rank.
        model: JSON-ready identity of the model (see `results.cell_key`).
        known: alike on every rank; only rank 0's should have a path, which each finished round is written to.
        shards: how windows are spread over data-parallel ranks.
        device: where the reduction wants its tensors.
        most_tokens: of one forward.
        on_windows: called with a count of finished windows.

    Raises:
        DataError: the results cannot be written.
    """
    shards = shards or Shards()
    keys = [cell_key(model, cell) for cell in cells]
    left = [number for number, key in enumerate(keys) if key not in known.cells]
    on_windows(sum(len(cell.cases) for cell in cells) - sum(len(cells[n].cases) for n in left))
    missing = {number: len(cells[number].cases) for number in left}
    found = {number: torch.zeros(count, COLUMNS, dtype=torch.float64) for number, count in missing.items()}
    for batches in _rounds({number: cells[number] for number in left}, shards.world, most_tokens):
        shards.before_round()
        windows = [window for batch in batches for window in batch]
        table = torch.zeros(len(windows), COLUMNS, dtype=torch.float64)
        own = batches[shards.rank] if shards.rank < len(batches) else ()
        if own or shards.lockstep:
            asked = own or batches[-1]
            scored = score_cases(score, [cells[n].cases[m] for n, m in asked])
            if own:
                begin = sum(len(batch) for batch in batches[: shards.rank])
                table[begin : begin + len(own)] = scored
        table = shards.all_reduce_sum(table.to(device or "cpu")).cpu()
        for (n, m), row in zip(windows, table, strict=True):
            found[n][m] = row
            missing[n] -= 1
        done = {
            keys[number]: _result(cells[number], found[number])
            for number in sorted({n for n, _ in windows})
            if missing[number] == 0
        }
        if done:
            known.add(done)
        on_windows(len(windows))
    return [known.cells[key] for key in keys]


def _result(cell: Cell, found: torch.Tensor) -> CellResult:
    hits, begun, nll = (tuple(column.tolist()) for column in found.unbind(dim=1))
    return CellResult(cell.task, cell.length, cell.depth, hits, nll, begun)
