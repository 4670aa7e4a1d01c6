"""Heat maps of retrieval, a cell a length and depth, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from parallel.errors import DataError
from pipeline.evaluation.results import CellResult
from pipeline.evaluation.ruler.results import RulerReport, means
from tools.compare_evaluations import Evaluated, base_of

matplotlib.use("Agg")  # no display is needed


def grid_of(cells: Sequence[CellResult]) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths, and scores [depth][length] of one task; NaN where a cell is missing."""
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    found = {(cell.depth, cell.length): cell.score for cell in cells}
    return lengths, depths, [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]


def draw(axes: Axes, cells: Sequence[CellResult], title: str, context: int | None = None) -> None:
    """One heat map; a line marks the last length within `context`."""
    lengths, depths, scores = grid_of(cells)
    axes.set_ylabel("depth")
    heat(axes, lengths, [f"{depth:.0%}" for depth in depths], scores, title, context)


def draw_ruler(axes: Axes, report: RulerReport, base: RulerReport | None, title: str) -> None:
    """RULER's heat map: a row a task and their mean; a line marks the effective length."""
    lengths = sorted({cell.length for cell in report.cells})
    found = {(cell.task, cell.length): cell.score for cell in report.cells}
    tasks, mean = list(dict.fromkeys(cell.task for cell in report.cells)), means(report.cells)
    scores = [[found.get((task, length), float("nan")) for length in lengths] for task in tasks]
    reached = report.effective(base)
    title = f"{title}\neffective length {reached.tokens:,} ({reached.criterion})"
    heat(axes, lengths, [*tasks, "mean"], [*scores, [mean[length] for length in lengths]], title, reached.tokens)


def heat(
    axes: Axes, lengths: Sequence[int], rows: Sequence[str], scores: list[list[float]], title: str, context: int | None
) -> None:
    """A heat map of scores [row][length]; a line marks the last length within `context`."""
    axes.imshow(scores, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows, fontsize=7 if len(rows) > 6 else None)
    axes.set_xlabel("tokens of the window")
    axes.set_title(title, fontsize=9)
    for y, row in enumerate(scores):
        for x, score in enumerate(row):
            axes.text(x, y, "" if score != score else f"{100 * score:.0f}", ha="center", va="center", fontsize=7)
    within = sum(length <= context for length in lengths) if context is not None else 0
    if 0 < within < len(lengths):
        axes.axvline(within - 0.5, color="black", linewidth=1.5)


def curves(axes: Axes, everything: Sequence[Evaluated]) -> None:
    """Perplexity by context length with its standard error, a line a model; broken models' are left out."""
    drawn = False
    for one in everything:
        if one.perplexity is None:
            continue
        results = [result for result in one.perplexity.lengths if result.perplexity < 1e6]
        errors = [result.perplexity * (result.nll_stderr or 0.0) for result in results]
        x, y = [result.length for result in results], [result.perplexity for result in results]
        drawn = drawn or bool(results)
        axes.errorbar(x, y, errors, marker="o", markersize=3, capsize=2, label=f"{one.folder.name}: {one.name}")
    if drawn:  # matplotlib has no logarithmic axis of nothing
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=7)


def page(path: Path, everything: Sequence[Evaluated]) -> None:
    """One page: perplexity by length, then a row of heat maps a model, a column a task.

    Raises:
        DataError: the picture cannot be written.
    """
    measured = [one for one in everything if one.retrieval is not None or one.ruler is not None]
    cells_of = {id(one): one.retrieval.cells if one.retrieval else () for one in measured}
    tasks = list(dict.fromkeys(cell.task for cells in cells_of.values() for cell in cells))
    columns = len(tasks) + any(one.ruler for one in measured)
    with_curves = any(one.perplexity for one in everything)
    rows = len(measured) + with_curves
    size = (max(4.8 * columns, 6.0), 3.2 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        if with_curves:
            curves(grid[0][0], everything)
            for axes in grid[0][1:]:
                axes.set_axis_off()
        for row, one in zip(grid[int(with_curves) :], measured, strict=True):
            who = f"{one.folder.name}, {one.name}"
            for axes, task in zip(row, tasks, strict=False):
                own = [cell for cell in cells_of[id(one)] if cell.task == task]
                if own and one.retrieval is not None:
                    draw(axes, own, f"{who}: {task}, % exact", one.retrieval.context)
                else:
                    axes.set_axis_off()
            if one.ruler is not None:
                base = base_of(one, everything)
                draw_ruler(row[-1], one.ruler, None if base is None else base.ruler, f"{who}: RULER, % of answers")
            elif columns > len(tasks):
                row[-1].set_axis_off()
        try:
            figure.savefig(path, dpi=130)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space there.") from None
    finally:
        plt.close(figure)
