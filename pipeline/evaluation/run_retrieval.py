"""Retrieval of a model that is loaded, on its grid: shown, resumed, written as `retrieval-<label>.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from parallel.world.collectives import share_from_main, sum_over
from parallel.world.groups import Groups
from pipeline.evaluation.perplexity import Shards
from pipeline.evaluation.results import CellResult, ResultFile
from pipeline.evaluation.retrieval import evaluate_retrieval
from pipeline.evaluation.tasks import Cell
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.reporting.progress import EvalProgress
from pipeline.storage.durable import replace_text


@dataclass(frozen=True)
class RetrievalReport:
    """What one model retrieves."""

    label: str
    """As in `EvalReport`."""
    step: int
    """Optimizer steps the model was trained for."""
    context: int
    """Tokens the model is made for."""
    base_context: int
    """Tokens the base was made for, as its config.json says."""
    cells: tuple[CellResult, ...]

    def write(self, path: Path) -> None:
        """Write as JSON.

        Raises:
            DataError: the file cannot be written.
        """
        data = {
            "label": self.label,
            "step": self.step,
            "context": self.context,
            "base_context": self.base_context,
            "cells": [cell.to_json() for cell in self.cells],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space there.") from None

    @classmethod
    def read(cls, path: Path) -> RetrievalReport:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or is not such a report.
        """
        try:
            data = json.loads(path.read_text())
            cells = tuple(CellResult.from_json(entry) for entry in data["cells"])
            step, context, base_context = (int(data[name]) for name in ("step", "context", "base_context"))
            return cls(str(data["label"]), step, context, base_context, cells)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: is not a retrieval report ({type(error).__name__}: {error}); evaluate again."
            ) from None


def report_path(output: Path, label: str) -> Path:
    """Where the report of a label lies."""
    return output / f"retrieval-{label}.json"


def run_retrieval(
    model: RankModel,
    groups: Groups,
    spec: AttentionSpec,
    cells: Sequence[Cell],
    identity: Mapping[str, Any],
    output: Path,
    *,
    label: str,
    step: int,
    context: int,
    base_context: int,
    shown: bool = True,
    kept: bool = True,
    before_round: Callable[[], None] = lambda: None,
) -> RetrievalReport:
    """Evaluate and, on rank 0, write the report; collective. Cells found by an earlier process are not computed again.

    Args:
        spec: full attention.
        cells: alike on every rank.
        identity: of the model, see `evaluate_retrieval`.
        output: the run's folder.
        label, step, context, base_context: see `RetrievalReport`.
        shown: display progress.
        kept: finished cells are kept for a process that goes on; False: `identity` does not tell all models apart.
        before_round: see `Shards`.

    Raises:
        DataError: the results cannot be read or written.
    """
    path = report_path(output, label)
    cache = path.with_name(f".{path.name}.cells") if kept else None
    text = share_from_main(groups, lambda: ResultFile.text_of(cache))
    known = ResultFile(cache if groups.is_main else None, text)
    shards = Shards(
        groups.data_rank,
        groups.plan.dp,
        lambda table: sum_over(groups.replicas, table),
        lockstep=model.shards is not None,
        before_round=before_round,
    )
    mode = model.training
    model.eval()
    windows = sum(len(cell.cases) for cell in cells)
    try:
        with EvalProgress(windows, f"retrieval, {label}", enabled=shown and groups.is_main) as progress:

            def count(done: int) -> None:
                for _ in range(done):
                    progress.advance()

            found = evaluate_retrieval(
                lambda tokens, labels: model.token_scores(tokens, labels, spec),
                cells,
                identity,
                known=known,
                shards=shards,
                device=groups.device,
                on_windows=count,
            )
    finally:
        model.train(mode)
    report = RetrievalReport(label, step, context, base_context, tuple(found))
    if groups.is_main:
        report.write(path)
    return report


def effective_length(scores: Mapping[int, float], threshold: float) -> int:
    """The longest length up to which every score is at least `threshold`, as RULER (arXiv 2404.06654) reads its table.

    Args:
        scores: by length.

    Returns:
        0: not even the shortest.
    """
    longest = 0
    for length in sorted(scores):
        if not scores[length] >= threshold or math.isnan(scores[length]):
            break
        longest = length
    return longest
