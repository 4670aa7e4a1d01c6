"""Answers on held-out conversations in a run's report: a table of the evaluations, and what became of them in words."""

from __future__ import annotations

from html import escape

from pipeline.evaluation.answers import AnswersReport, verdict_on_answers
from pipeline.reporting.words import counted
from tools.support import report_plots as plots
from tools.support.report_html import section, table
from tools.support.report_record import RunRecord

FIGURES = ("loss, nats", "perplexity", "word for word")


def answers_section(record: RunRecord) -> str:
    """Loss, perplexity and exact answers, a row an evaluation; empty where no conversations were held out."""
    if not record.answers:
        return ""
    titles = {key: style.title for key, style in plots.styles(record.answers).items()}
    lines = [[titles[key], *figures(report)] for key, report in record.answers.items()]
    some = next(iter(record.answers.values()))
    said = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in verdict_on_answers(record.folder))
    return section(
        "Answers on held-out conversations",
        f"<ul>{said}</ul>" if said else "",
        table(["", *FIGURES], lines, numbers=True),
        f"<p><small>Mean over the {counted(some.scored, 'scored token', grouped=True)} of "
        f"{counted(len(some.tokens), 'conversation', grouped=True)}, each seeing itself only "
        "under full attention. ± is one standard error over conversations. Word for word: greedy decoding gives "
        "exactly the answers of the conversation.</small></p>",
    )


def figures(report: AnswersReport) -> list[str]:
    """Cells of FIGURES: loss with its standard error, perplexity, and the share of exact answers."""
    error = "" if report.nll_stderr is None else f" ± {report.nll_stderr:.4f}"
    return [f"{report.nll:.4f}{error}", f"{report.perplexity:.4g}", f"{report.exact:.0%}"]
