"""Retrieval of a model that is loaded, on its grid: shown, resumed, written as `retrieval-<label>.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.world.groups import Groups
from pipeline.evaluation.mode import evaluating, kept_alike, spread_over
from pipeline.evaluation.results import ResultFile, RetrievalReport, report_path
from pipeline.evaluation.retrieval import evaluate_retrieval
from pipeline.evaluation.tasks import Cell
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.reporting.lasting import optional_file
from pipeline.reporting.progress import EvalProgress


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
    seed: int,
    text: str,
    model_of: str | None = None,
    shown: bool = True,
    kept: bool = True,
    beside: bool = False,
    before_round: Callable[[], None] = lambda: None,
) -> RetrievalReport:
    """Evaluate and, on rank 0, write the report; collective. Cells found by an earlier process are not computed again.

    Args:
        spec: full attention.
        cells: alike on every rank.
        identity: of the model, see `evaluate_retrieval`.
        output: the run's folder.
        label, step, context, base_context, seed, text: see `RetrievalReport`.
        model_of: its `model`.
        shown: display progress.
        kept: finished cells are kept for a process that goes on; False: `identity` does not tell all models apart.
        beside: the file keeps further cells of the same model, see `ModelReport.with_further`.
        before_round: see `Shards`.

    Raises:
        DataError: finished cells cannot be read or kept.
    """
    path = report_path(output, label)
    cache = path.with_name(f".{path.name}.cells") if kept else None
    known = kept_alike(ResultFile, cache, groups)
    windows = sum(len(cell.cases) for cell in cells)
    progress_of = EvalProgress(windows, f"retrieval, {label}", enabled=shown and groups.is_main)
    with evaluating(model), progress_of as progress:
        found = evaluate_retrieval(
            lambda tokens, labels: model.token_scores(tokens, labels, spec),
            cells,
            identity,
            known=known,
            shards=spread_over(model, groups, before_round),
            device=groups.device,
            on_windows=progress.advance,
        )
    report = RetrievalReport(label, step, context, base_context, tuple(found), seed, text, model_of)
    if groups.is_main:
        with optional_file(path):
            (report.with_further(path) if beside else report).write(path)
    return report
