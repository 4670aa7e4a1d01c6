"""What was evaluated, side by side: perplexity and retrieval by length, differences to the base with their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from parallel.errors import DataError
from pipeline.evaluation.perplexity import EvalReport
from pipeline.evaluation.results import RetrievalReport, by_length, lost_and_won, reads_worse, relative, standard_error

SHOWN = {"shipped": "as shipped", "untrained": "RoPE stretched, untrained", "after": "trained"}


@dataclass(frozen=True)
class Evaluated:
    """One model in one state, as far as it was evaluated."""

    folder: Path
    label: str
    step: int
    perplexity: EvalReport | None
    retrieval: RetrievalReport | None

    @property
    def name(self) -> str:
        """For a reader."""
        return SHOWN.get(self.label, self.label)


def read_evaluated(folders: Sequence[Path]) -> list[Evaluated]:
    """Every state in `eval-*.json` and `retrieval-*.json` of the folders: as shipped, then by steps.

    Raises:
        DataError: a folder was never evaluated, or a report is damaged.
    """
    found = []
    for folder in folders:
        perplexity = {report.label: report for report in map(EvalReport.read, sorted(folder.glob("eval-*.json")))}
        retrieval = {
            report.label: report for report in map(RetrievalReport.read, sorted(folder.glob("retrieval-*.json")))
        }
        if not perplexity and not retrieval:
            raise DataError(f"{folder}: holds no eval-*.json and no retrieval-*.json; evaluate the run first.")
        order = list(SHOWN)
        states = [
            Evaluated(folder, label, (perplexity.get(label) or retrieval[label]).step, *pair)
            for label, pair in {
                label: (perplexity.get(label), retrieval.get(label)) for label in [*perplexity, *retrieval]
            }.items()
        ]
        found += sorted(states, key=lambda e: (order.index(e.label) if e.label in order else 1.5, e.step))
    return found


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
    """Perplexity, then retrieval a task."""
    several = len({one.folder for one in everything}) > 1
    names = {id(one): f"{one.folder.name}: {one.name}" if several else one.name for one in everything}
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


def sentences(everything: Sequence[Evaluated]) -> list[str]:
    """What was lost against the base within its own context, in words."""
    said = []
    for one in everything:
        base = base_of(one, everything)
        if base is None or base is one:
            continue
        where = f"{one.folder.name}, {one.name}: "
        if one.retrieval and base.retrieval:
            told = lost_and_won(one.retrieval.cells, base.retrieval.cells, base.retrieval.base_context)
            said += [where + sentence for sentence in told]
        own = base.retrieval.base_context if base.retrieval else None
        if one.perplexity and base.perplexity and own is not None:
            said += [where + sentence for sentence in reads_worse(one.perplexity, base.perplexity, own)]
    return said
