"""What was evaluated, side by side: perplexity and retrieval by length, differences to the base with their errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from parallel.errors import DataError
from pipeline.evaluation.answers import BEGUN, AnswersReport, compared
from pipeline.evaluation.kept import PART
from pipeline.evaluation.perplexity import EvalReport
from pipeline.evaluation.results import Found, RetrievalReport, by_length, by_task, relative, standard_error
from pipeline.evaluation.ruler.results import RulerReport, fell_short, means

SHOWN = {"shipped": "as shipped", "untrained": "RoPE stretched, untrained", "after": "trained"}


@dataclass(frozen=True)
class Evaluated:
    """One model in one state, as far as it was evaluated."""

    folder: Path
    label: str
    step: int
    perplexity: EvalReport | None
    retrieval: RetrievalReport | None
    ruler: RulerReport | None = None
    answers: AnswersReport | None = None
    """On held-out conversations."""

    @property
    def found(self) -> Found:
        """What a base is compared in."""
        cells = [cell for report in (self.retrieval, self.ruler) if report is not None for cell in report.cells]
        return Found(self.perplexity, cells)

    @property
    def base_context(self) -> int | None:
        """Tokens the base was made for; None: no report says it."""
        report = self.retrieval or self.ruler
        return None if report is None else report.base_context

    @property
    def name(self) -> str:
        """For a reader."""
        return SHOWN.get(self.label, self.label)


def read_evaluated(folders: Sequence[Path]) -> list[Evaluated]:
    """Every state in `eval-*.json`, `answers-*.json`, `retrieval-*.json` and `ruler-*.json` of the folders: as shipped,
    then by steps.

    Raises:
        DataError: a folder was never evaluated, or a report is damaged.
    """
    found = []
    for folder in folders:
        perplexity = {report.label: report for report in map(EvalReport.read, sorted(folder.glob("eval-*.json")))}
        retrieval = {
            report.label: report for report in map(RetrievalReport.read, sorted(folder.glob("retrieval-*.json")))
        }
        ruler = {report.label: report for report in map(RulerReport.read, sorted(folder.glob("ruler-*.json")))}
        answers = {report.label: report for report in map(AnswersReport.read, sorted(folder.glob("answers-*.json")))}
        if not perplexity and not retrieval and not ruler and not answers:
            raise DataError(
                f"{folder}: holds no eval-*.json, no answers-*.json, no retrieval-*.json and no ruler-*.json; evaluate "
                "the run first."
            )
        order = list(SHOWN)
        states = [
            Evaluated(folder, label, next(report.step for report in reports if report is not None), *reports)
            for label, reports in {
                label: (perplexity.get(label), retrieval.get(label), ruler.get(label), answers.get(label))
                for label in [*perplexity, *retrieval, *ruler, *answers]
            }.items()
        ]
        found += sorted(states, key=lambda e: (order.index(e.label) if e.label in order else 1.5, e.step, _part(e)))
    return found


def _part(one: Evaluated) -> float:
    """How much of the training its weights have, of some of the way; of others 0."""
    return float(one.label.removeprefix(PART)) if one.label.startswith(PART) else 0.0


def _names(everything: Sequence[Evaluated]) -> dict[int, str]:
    """For a reader, by `id`."""
    several = len({one.folder for one in everything}) > 1
    last = {one.folder: one.step for one in everything if one.label == "after"}
    names = {}
    for one in everything:
        # Of a run that has gone on since, it is no part of what is called trained.
        stale = one.label.startswith(PART) and last.get(one.folder, one.step) != one.step
        name = f"{one.name} of step {one.step}" if stale else one.name
        names[id(one)] = f"{one.folder.name}: {name}" if several else name
    return names


def against(mine: EvalReport, base: EvalReport, length: int) -> str:
    """Perplexity against the base's on the same windows, `+1.2% ± 0.3`; empty where they cannot be compared."""
    results = [{r.length: r for r in report.lengths}.get(length) for report in (mine, base)]
    own, theirs = results
    if own is None or theirs is None or not own.window_nll or len(own.window_nll) != len(theirs.window_nll):
        return ""
    return relative(own.window_nll, theirs.window_nll)


def base_of(one: Evaluated, everything: Sequence[Evaluated]) -> Evaluated | None:
    """The base as shipped: of the same folder, else the first there is."""
    shipped = [other for other in everything if other.label == "shipped"]
    return next((other for other in shipped if other.folder == one.folder), shipped[0] if shipped else None)


def tables(everything: Sequence[Evaluated]) -> Iterator[Table]:
    """Perplexity, answers, then retrieval a task, then RULER."""
    names = _names(everything)
    lengths = sorted({length for one in everything if one.perplexity for length in one.perplexity.perplexity})
    if lengths:
        table = Table(title="Perplexity by context length, tokens (full attention); difference to the base")
        table.add_column("model")
        for length in lengths:
            table.add_column(str(length), justify="right")
        for one in everything:
            if one.perplexity is None:
                continue
            base, cells = base_of(one, everything), []
            for length in lengths:
                found = one.perplexity.perplexity.get(length)
                cell = "" if found is None else (f"{found:.2f}" if found < 1e6 else f"{found:.2e}")
                if found is not None and base is not None and base is not one and base.perplexity is not None:
                    if difference := against(one.perplexity, base.perplexity, length):
                        cell += f"\n{difference}"
                cells.append(cell)
            table.add_row(names[id(one)], *cells)
        yield table
    answered = [(one, one.answers) for one in everything if one.answers is not None]
    if answered:
        table = Table(title="Answers on held-out conversations (full attention)")
        for column in ("model", "conversations", "loss, nats", "perplexity", "% word for word"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for one, answers in answered:
            reach = "" if answers.nll_stderr is None else f" ± {answers.nll_stderr:.4f}"
            counts = str(len(answers.tokens)), f"{answers.nll:.4f}{reach}"
            table.add_row(names[id(one)], *counts, f"{answers.perplexity:.4g}", f"{100 * answers.exact:.0f}")
        yield table
    for task in dict.fromkeys(c.task for one in everything if one.retrieval for c in one.retrieval.cells):
        asked = [one for one in everything if one.retrieval and any(c.task == task for c in one.retrieval.cells)]
        found_by = {id(one): [c for c in one.retrieval.cells if c.task == task] for one in asked if one.retrieval}
        lengths = sorted({cell.length for cells in found_by.values() for cell in cells})
        table = Table(title=f"Retrieval, {task}: % exact by tokens of the window, mean over depths ± standard error")
        for column in ("model", *map(str, lengths), "worst cell"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for one in asked:
            mine, cells = found_by[id(one)], []
            means = by_length(mine)
            for length in lengths:
                error = standard_error([score for cell in mine if cell.length == length for score in cell.scores])
                shown = f"{100 * means[length][0]:.0f}" if length in means else ""
                cells.append(shown + (f" ± {100 * error:.0f}" if shown and error else ""))
            worst = min(mine, key=lambda cell: cell.score)
            table.add_row(
                names[id(one)], *cells, f"{100 * worst.score:.0f} at {worst.length}, depth {100 * worst.depth:.0f}%"
            )
        yield table
    yield from ruler_table(everything, names)


def ruler_table(everything: Sequence[Evaluated], names: Mapping[int, str]) -> Iterator[Table]:
    """RULER: a row a task and the mean of each model, with its effective length; nothing where it was not measured."""
    asked = [(one, one.ruler) for one in everything if one.ruler is not None]
    lengths = sorted({cell.length for _, report in asked for cell in report.cells})
    if not asked:
        return
    table = Table(title="RULER: % of the answers written, by tokens of the window")
    for column in ("model", "task", *map(str, lengths)):
        table.add_column(column, justify="right" if column.isdigit() else "left")
    for one, report in asked:
        base = base_of(one, everything)
        rows = {task: {cell.length: cell.score for cell in cells} for task, cells in by_task(report.cells).items()}
        rows["mean"] = means(report.cells)
        for task, scores in rows.items():
            shown = [f"{100 * scores[length]:.0f}" if length in scores else "" for length in lengths]
            table.add_row(names[id(one)], task, *shown, end_section=task == "mean")
        words = report.effective(None if base is None else base.ruler).sentence
        table.caption = "\n".join(filter(None, [str(table.caption or ""), f"{names[id(one)]}: {words}"]))
    yield table


def sentences(everything: Sequence[Evaluated]) -> list[str]:
    """What was lost against the base within its own context, and what became of answers, in words."""
    said = []
    for one in everything:
        begun = {other.label: other.answers for other in everything if other.folder == one.folder and other.answers}
        first = next((label for label in BEGUN if label in begun), None)
        if one.answers is not None and first is not None and one.label not in BEGUN:
            change = compared(begun[first], one.answers, BEGUN[first])
            said += [f"{one.folder.name}, {one.name}: {change}"] if change else []
        base = base_of(one, everything)
        if base is None or base is one:
            continue
        if base.base_context is not None:
            words = one.found.against(base.found, base.base_context)
            if one.ruler is not None and base.ruler is not None:
                words += fell_short(one.ruler, base.ruler, "the base")
            said += [f"{one.folder.name}, {one.name}: {sentence}" for sentence in words]
    return said
