"""RULER in a run's report: a table of its tasks by length, and the effective lengths."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from pipeline.evaluation.ruler.results import RulerReport, means
from tools.support import report_plots as plots
from tools.support.report_html import section, table


def ruler_section(reports: Mapping[str, RulerReport]) -> str:
    """Shares of the answers by task, a column an evaluation and length; empty where RULER was not measured.

    Args:
        reports: by file key, in the order they are told.
    """
    if not reports:
        return ""
    base = reports.get("shipped")
    columns = [(key, n) for key, report in reports.items() for n in means(report.cells)]
    lines = []
    for task in dict.fromkeys(cell.task for report in reports.values() for cell in report.cells):
        found = {(key, c.length): c.score for key, report in reports.items() for c in report.cells if c.task == task}
        lines.append([task, *(f"{found[column]:.0%}" if column in found else "–" for column in columns)])
    lines.append(["mean", *(f"{means(reports[key].cells)[n]:.0%}" for key, n in columns)])
    said = "".join(f"<li>{escape(key)}: {escape(one.effective(base).sentence)}</li>\n" for key, one in reports.items())
    return section(
        "RULER",
        table(["task", *(f"{key}, {plots.tokens_label(n)}" for key, n in columns)], lines, numbers=True),
        "<p><small>Shares of the answers that greedy decoding writes, means over prompts.</small></p>",
        f"<ul>{said}</ul>",
    )
