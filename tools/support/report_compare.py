"""Runs side by side on a report's page: settings that differ, what came of them, and their curves in one picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from parallel.errors import DataError
from pipeline.evaluation.perplexity import EvalReport
from pipeline.evaluation.results import by_length, by_task
from pipeline.reporting.progress import duration
from tools.support import report_plots as plots
from tools.support.report_answers import FIGURES, figures
from tools.support.report_html import missing, section, show, table
from tools.support.report_record import FIRST, RunRecord, flatten, not_finite, perplexity_cell

TAIL = 10
"""Last steps whose mean loss is shown."""
SAME_TEXT = ("eval.path", "eval.windows", "eval.stride")
"""Settings without which perplexities mean different things."""
GONE = "–"


def named(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The runs by the shortest end of their paths that tells them apart.

    Raises:
        DataError: one is given twice.
    """
    paths = [record.folder.resolve() for record in records]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise DataError(f"--compare: {twice} is given twice; name other runs.")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, records, strict=True))


def last_evaluation(record: RunRecord) -> EvalReport | None:
    """Of the weights as trained last; None: the run has none."""
    trained = [report for key, report in record.evaluations.items() if key not in FIRST]
    return trained[-1] if trained else None


def _differing(records: Mapping[str, RunRecord]) -> list[list[str]]:
    """Settings that are not alike, a line each."""
    flat = [flatten(record.config) for record in records.values()]
    names = dict.fromkeys(name for config in flat for name in config if name != "output")
    lines = [[name, *(show(config.get(name)) for config in flat)] for name in names]
    return [line for line in lines if len(set(line[1:])) > 1]


def _results(records: Mapping[str, RunRecord]) -> list[list[str]]:
    """What came of each run, a line a figure."""

    def line(name: str, of: Callable[[list[dict[str, Any]]], str]) -> list[str]:
        return [name, *(of(record.rows) if record.rows else GONE for record in records.values())]

    def tail(rows: list[dict[str, Any]]) -> str:
        finite = [row["loss"] for row in rows if math.isfinite(row["loss"])][-TAIL:]
        return f"{statistics.fmean(finite):.4f}" if finite else GONE

    broken = any(not_finite(record.rows) for record in records.values())
    return [
        line("optimizer steps", lambda rows: f"{rows[-1]['step']:,}"),
        line("steps skipped", lambda rows: f"{rows[-1]['skipped']:,}"),
        line("tokens", lambda rows: f"{sum(row['tokens'] for row in rows):,}"),
        line(f"loss, mean of last {TAIL} steps", tail),
        *([line("loss is not finite", lambda rows: not_finite(rows) or "never")] if broken else []),
        line("tokens a second, median", lambda rows: f"{statistics.median(r['tokens_per_second'] for r in rows):,.0f}"),
        line("time in steps", lambda rows: duration(sum(row["seconds"] for row in rows))),
        line("peak memory of rank 0, GiB", lambda rows: f"{max(row['memory_gib'] for row in rows):.2f}"),
    ]


def _perplexities(records: Mapping[str, RunRecord]) -> list[list[str]]:
    """Perplexity of each run's last evaluation, a line a length."""
    reports = [last_evaluation(record) for record in records.values()]
    lengths = sorted({length for report in reports if report is not None for length in report.perplexity})
    lines = []
    for length in lengths:
        cells = [
            next((perplexity_cell(r) for r in ([] if report is None else report.lengths) if r.length == length), GONE)
            for report in reports
        ]
        lines.append([f"perplexity at {plots.tokens_label(length)}", *cells])
    return lines


def _answers(records: Mapping[str, RunRecord]) -> list[list[str]]:
    """Of each run's last evaluation on held-out conversations, a line a figure; none where no run has one."""
    found: list[list[str] | None] = []
    for record in records.values():
        trained = [report for key, report in record.answers.items() if key not in FIRST]
        found.append(figures(trained[-1]) if trained else None)
    lines = [
        [f"answers, {name}", *(GONE if cells is None else cells[row] for cells in found)]
        for row, name in enumerate(FIGURES)
    ]
    return lines if any(found) else []


def _retrieval(records: Mapping[str, RunRecord]) -> list[list[str]]:
    """Exact answers of each run's last retrieval, a line a task and length."""
    found: list[dict[tuple[str, int], float]] = []
    for record in records.values():
        trained = [report for key, report in record.retrieval.items() if key not in FIRST]
        cells = by_task(trained[-1].cells) if trained else {}
        found.append({(task, size): value[0] for task in cells for size, value in by_length(cells[task]).items()})
    return [
        [
            f"{task} at {plots.tokens_label(size)}",
            *(f"{one[task, size]:.0%}" if (task, size) in one else GONE for one in found),
        ]
        for task, size in sorted({key for one in found for key in one})
    ]


def compared_section(records: Mapping[str, RunRecord], images: Mapping[str, str]) -> str:
    """The runs side by side.

    Args:
        records: by name, two at least.
        images: HTML of the pictures of `draw_compared`.
    """
    differing = _differing(records)
    settings = table(["setting", *records], differing) if differing else missing("Their settings are alike.")
    configs = [flatten(record.config) for record in records.values()]
    apart = [name for name in SAME_TEXT if len({show(config.get(name)) for config in configs}) > 1]
    note = missing(f"Perplexities were not measured alike; what differs: {', '.join(apart)}.") if apart else ""
    figures = [*_results(records), *_perplexities(records), *_answers(records), *_retrieval(records)]
    return section(
        f"{len(records)} runs side by side",
        settings,
        table(["", *records], figures, numbers=True),
        note,
        images.get("compared_loss", ""),
        images.get("compared_perplexity", ""),
    )


def draw_compared(records: Mapping[str, RunRecord]) -> dict[str, tuple[str, bytes]]:
    """PNGs of what the runs have: file stem -> (caption, bytes)."""
    drawn: dict[str, tuple[str, bytes]] = {}
    curves = {}
    for name, record in records.items():
        if record.rows:
            tokens = accumulate(row["tokens"] for row in record.rows)
            curves[name] = [(read, row["loss"]) for read, row in zip(tokens, record.rows, strict=True)]
    if curves:
        caption = "Mean cross entropy of each optimizer step, by the tokens trained on."
        drawn["compared_loss"] = caption, plots.to_png(plots.compared_loss_figure(curves))
    reports = {name: report for name, record in records.items() if (report := last_evaluation(record)) is not None}
    if reports:
        caption = "Of each run's last evaluation; lower is better; bars are one standard error."
        drawn["compared_perplexity"] = caption, plots.to_png(plots.length_figure(reports))
    return drawn
