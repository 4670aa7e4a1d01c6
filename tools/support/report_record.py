"""What a run leaves in its folder, as a report reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import DataError
from pipeline.checkpoint.manifest import step_of
from pipeline.evaluation.answers import AnswersReport
from pipeline.evaluation.dense_gap import DenseGap
from pipeline.evaluation.perplexity import EvalReport, LengthResult
from pipeline.evaluation.results import RetrievalReport
from pipeline.evaluation.ruler.results import RulerReport
from pipeline.reporting.metrics import METRICS_FILE, read_metrics

FIRST, LAST = ("shipped", "before", "untrained", "initial"), ("after",)
"""Keys of evaluations that are told first, and last."""


@dataclass(frozen=True)
class RunRecord:
    """What was found in a run folder."""

    folder: Path
    rows: list[dict[str, Any]]
    """Metrics, a step each; empty without metrics.jsonl."""
    evaluations: dict[str, EvalReport]
    """By file key, in the order they are told."""
    answers: dict[str, AnswersReport]
    """Of held-out conversations, by file key, in the order they are told."""
    retrieval: dict[str, RetrievalReport]
    """By file key, in the order they are told."""
    ruler: dict[str, RulerReport]
    """By file key, in the order they are told."""
    gaps: dict[str, DenseGap]
    """By file key, in the order they are told."""
    config: dict[str, Any]
    """Resolved configuration, nested; empty without config.yaml."""
    facts: dict[str, Any]
    """run.json; empty without it."""


def evaluation_order(key: str) -> tuple[int, int, str]:
    """Sort key: as shipped, untrained, then during training by step, then others, then after."""
    if key in FIRST:
        return FIRST.index(key), 0, key
    # As text, step 1,000,000 would come before step 999,999.
    step = step_of(key)
    return (50, step, key) if step is not None else (99 if key in LAST else 60, 0, key)


def not_finite(rows: Sequence[Mapping[str, Any]]) -> str:
    """At how many steps the loss was NaN or infinite, and from which to which; empty: at none.

    Args:
        rows: as `RunRecord.rows`.
    """
    steps = [row["step"] for row in rows if not math.isfinite(row["loss"])]
    if not steps:
        return ""
    where = (
        f"at step {steps[0]:,}" if len(steps) == 1 else f"at {len(steps):,} steps from {steps[0]:,} to {steps[-1]:,}"
    )
    return f"{where}{', the last one' if steps[-1] == rows[-1]['step'] else ''}"


def _mapping(path: Path, text: str) -> dict[str, Any]:
    """Parse a YAML or JSON file that holds named values."""
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be parsed ({str(error).splitlines()[0]}); restore or remove it.") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds no named values; restore or remove it.")
    return data


def _by_key[R](folder: Path, kind: str, read: Callable[[Path], R]) -> dict[str, R]:
    """Reports of one kind by file key, in the order they are told."""
    paths = {path.stem.removeprefix(f"{kind}-"): path for path in folder.glob(f"{kind}-*.json")}
    return {key: read(paths[key]) for key in sorted(paths, key=evaluation_order)}


def read_run(folder: Path) -> RunRecord:
    """Collect a run's records.

    Raises:
        DataError: the folder is missing, holds nothing to report, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"--run: {folder} is not a folder; name the output folder of a run.")
    metrics = folder / METRICS_FILE
    named = [folder / name for name in ("config.yaml", "run.json")]
    config, facts = (_mapping(path, path.read_text()) if path.is_file() else {} for path in named)
    record = RunRecord(
        folder=folder,
        rows=read_metrics(metrics) if metrics.is_file() else [],
        evaluations=_by_key(folder, "eval", EvalReport.read),
        answers=_by_key(folder, "answers", AnswersReport.read),
        retrieval=_by_key(folder, "retrieval", RetrievalReport.read),
        ruler=_by_key(folder, "ruler", RulerReport.read),
        gaps=_by_key(folder, "gap", DenseGap.read),
        config=config,
        facts=facts,
    )
    if not any((record.rows, record.evaluations, record.answers, record.retrieval, record.ruler)):
        raise DataError(f"--run: {folder} holds neither {METRICS_FILE} nor eval-*.json; name a run that has begun.")
    return record


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of nested values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def perplexity_cell(result: LengthResult) -> str:
    """Perplexity with the reach of one standard error."""
    perplexity = result.perplexity
    if not 0 <= perplexity < float("inf"):
        return "not finite"
    if perplexity >= 1e4:
        return f"{perplexity:.3g}"
    digits = 2 if perplexity < 100 else 1
    error = "" if result.nll_stderr is None else f" ± {perplexity * result.nll_stderr:.{digits}f}"
    return f"{perplexity:.{digits}f}{error}"
