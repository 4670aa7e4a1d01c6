"""Evaluations of a model that is gone, removed: a run went back, or began anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from parallel.errors import DataError
from pipeline.evaluation.answers import AnswersReport
from pipeline.evaluation.dense_gap import DenseGap
from pipeline.evaluation.long_ppl import LongPpl
from pipeline.evaluation.perplexity import EvalReport
from pipeline.evaluation.results import RetrievalReport
from pipeline.evaluation.ruler.results import RulerReport
from pipeline.reporting.lasting import optional_file


def forget_later(output: Path, step: int) -> None:
    """Remove evaluations of a model trained for more than `step` steps: it is gone, and another takes its place."""
    readers: dict[
        str, Callable[[Path], EvalReport | AnswersReport | RetrievalReport | RulerReport | DenseGap | LongPpl]
    ] = {
        "eval": EvalReport.read,
        "answers": AnswersReport.read,
        "retrieval": RetrievalReport.read,
        "ruler": RulerReport.read,
        "gap": DenseGap.read,
        "longppl": LongPpl.read,
    }
    for kind, read in readers.items():
        for path in output.glob(f"{kind}-*.json"):
            with optional_file(path), contextlib.suppress(DataError):
                if read(path).step > step:
                    path.unlink()
