"""RULER of a model that is loaded, on its grid: shown, resumed, written as `ruler-<label>.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.world.groups import Groups
from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.mode import evaluating, kept_alike, spread_over
from pipeline.evaluation.ruler.results import RulerFile, RulerReport, RulerResult, ruler_key, ruler_path, shipped_ruler
from pipeline.evaluation.ruler.score import string_match
from pipeline.evaluation.ruler.tasks import RulerCell
from pipeline.evaluation.spread import Shards, rounds
from pipeline.model.greedy import greedy
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.stream import TOGETHER
from pipeline.reporting.lasting import optional_file, to_stderr
from pipeline.reporting.progress import EvalProgress


@dataclass(frozen=True)
class Asked:
    """What a decoder is given, besides prompts; see `pipeline.model.greedy.greedy`."""

    new: int
    ended: Callable[[int, list[int]], bool]
    guesses: Sequence[Sequence[int]]
    goes_on: Callable[[bool], bool]
    among: Sequence[int]


Decode = Callable[[Sequence[Sequence[int]], Asked], list[list[int]]]
"""Prompts -> what greedy decoding writes after each."""


def evaluate_ruler(
    decode: Decode,
    cells: Sequence[RulerCell],
    model: Mapping[str, Any],
    tokenizer: TextTokenizer,
    *,
    known: RulerFile,
    shards: Shards | None = None,
    device: torch.device | None = None,
    most_tokens: int = TOGETHER,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> list[RulerResult]:
    """Results of every cell, in the order of `cells`; those in `known` are not computed again. Alike on every rank.

    Args:
        decode: the model under full attention.
        cells: the same on every rank.
        model: JSON-ready identity of the model.
        known: alike on every rank; only rank 0's should have a path, which each finished cell is written to.
        shards: how prompts are spread over data-parallel ranks.
        device: where the reduction wants its tensors.
        most_tokens: of one forward, unless one prompt is longer.
        on_prompts: called with a count of finished prompts.

    Raises:
        DataError: the results cannot be written.
    """
    shards, found = shards or Shards(), []
    for cell in cells:
        key = ruler_key(model, cell)
        if key in known.cells:
            on_prompts(len(cell.samples))
        else:
            known.add({key: _evaluate(decode, cell, tokenizer, shards, device, most_tokens, on_prompts)})
        found.append(known.cells[key])
    return found


def _evaluate(
    decode: Decode,
    cell: RulerCell,
    tokenizer: TextTokenizer,
    shards: Shards,
    device: torch.device | None,
    most_tokens: int,
    on_prompts: Callable[[int], None],
) -> RulerResult:
    """One cell."""
    (new,) = {sample.new for sample in cell.samples}
    longest = max(map(len, cell.prompts)) + new
    # Of each prompt: how many ids were written, and which.
    table = torch.zeros(len(cell.samples), 1 + new, dtype=torch.float64)

    def goes_on(mine: bool) -> bool:
        if not shards.lockstep:
            return mine
        left = torch.tensor([float(mine)], dtype=torch.float64, device=device)
        return bool(shards.all_reduce_sum(left) > 0)

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode([token for token in ids if token != tokenizer.eos_id and token < tokenizer.vocab_size])

    for batches in rounds(range(len(cell.samples)), shards.world, most_tokens // longest):
        shards.before_round()
        mine = shards.rank < len(batches)
        if mine or shards.lockstep:
            rows = batches[shards.rank if mine else -1]
            samples = [cell.samples[row] for row in rows]

            def ended(row: int, ids: list[int], samples: Sequence[Any] = samples) -> bool:
                # Nothing that is written further lowers the score.
                return ids[-1] == tokenizer.eos_id or string_match(text(ids), samples[row].answers) == 1

            written = decode(
                [cell.prompts[row] for row in rows],
                Asked(
                    new,
                    ended,
                    [tokenizer.encode(" " + " ".join(sample.answers)) for sample in samples],
                    goes_on,
                    [len(cell.prompts[row]) for batch in batches for row in batch] if shards.lockstep else (),
                ),
            )
            for row, ids in zip(rows, written if mine else [], strict=mine):
                table[row, : 1 + len(ids)] = torch.tensor([len(ids), *ids], dtype=torch.float64)
        on_prompts(sum(map(len, batches)))
    table = shards.all_reduce_sum(table.to(device or "cpu")).cpu()
    said = [text([int(token) for token in row[1 : 1 + int(row[0])]]) for row in table]
    scores = tuple(string_match(one, sample.answers) for one, sample in zip(said, cell.samples, strict=True))
    return RulerResult(cell.task, cell.length, scores, tuple(said))


def decoder(model: RankModel, spec: AttentionSpec) -> Decode:
    """Greedy decoding by a model that is loaded.

    Args:
        spec: full attention.
    """

    def decode(given: Sequence[Sequence[int]], asked: Asked) -> list[list[int]]:
        return greedy(model, given, asked.new, spec, asked.ended, asked.guesses, asked.goes_on, asked.among)

    return decode


def run_ruler(
    model: RankModel,
    groups: Groups,
    spec: AttentionSpec,
    cells: Sequence[RulerCell],
    identity: Mapping[str, Any],
    output: Path,
    tokenizer: TextTokenizer,
    *,
    label: str,
    step: int,
    context: int,
    base_context: int,
    seed: int,
    text: str,
    model_of: str | None = None,
    shown: bool = True,
    kept: bool = True,
    beside: bool = False,
    cost: str = "",
    before_round: Callable[[], None] = lambda: None,
) -> RulerReport:
    """Evaluate and, on rank 0, write the report; collective. Cells found by an earlier process are not computed again.

    Args:
        spec: full attention.
        cells: alike on every rank.
        identity: of the model, see `evaluate_ruler`.
        output: the run's folder.
        label, step, context, base_context, seed, text: see `RulerReport`.
        model_of: its `model`.
        shown, kept, beside, before_round: see `run_retrieval`.
        cost: a sentence that is said first.

    Raises:
        DataError: finished cells cannot be read or kept.
    """
    path = ruler_path(output, label)
    cache = path.with_name(f".{path.name}.cells") if kept else None
    known = kept_alike(RulerFile, cache, groups)
    prompts = sum(len(cell.samples) for cell in cells)
    progress_of = EvalProgress(prompts, f"RULER, {label}", enabled=shown and groups.is_main)
    with evaluating(model), progress_of as progress:
        if cost:
            progress.say(f"RULER, {label}: {cost}")
        found = evaluate_ruler(
            decoder(model, spec),
            cells,
            identity,
            tokenizer,
            known=known,
            shards=spread_over(model, groups, before_round),
            device=groups.device,
            on_prompts=progress.advance,
        )
    report = RulerReport(label, step, context, base_context, tuple(found), seed, text, model_of)
    if groups.is_main:
        whole = report.with_further(path) if beside else report
        base = whole if label == "shipped" else shipped_ruler(output, to_stderr)
        with optional_file(path):
            whole.write(path, base)
    return report
