"""Heat maps of retrieval, a cell a length and depth, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from parallel.errors import DataError  # noqa: E402
from pipeline.evaluation.results import CellResult  # noqa: E402


def grid_of(cells: Sequence[CellResult]) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths, and scores [depth][length] of one task; NaN where a cell is missing."""
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    found = {(cell.depth, cell.length): cell.score for cell in cells}
    return lengths, depths, [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]


def draw(axes: Axes, cells: Sequence[CellResult], title: str, context: int | None = None) -> None:
    """One heat map; a line marks the last length within `context`."""
    lengths, depths, scores = grid_of(cells)
    axes.imshow(scores, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of the window")
    axes.set_ylabel("depth")
    axes.set_title(title, fontsize=9)
    for y, row in enumerate(scores):
        for x, score in enumerate(row):
            axes.text(x, y, "" if score != score else f"{100 * score:.0f}", ha="center", va="center", fontsize=7)
    within = sum(length <= context for length in lengths) if context is not None else 0
    if 0 < within < len(lengths):
        axes.axvline(within - 0.5, color="black", linewidth=1.5)


def heat_maps(path: Path, reports: Sequence[tuple[str, Sequence[CellResult], int | None]]) -> None:
    """One page: a row a model, a column a task.

    Args:
        path: of the PNG.
        reports: (name of the model, its cells, tokens it is made for: a line is drawn there).

    Raises:
        DataError: the picture cannot be written.
    """
    tasks = list(dict.fromkeys(cell.task for _, cells, _ in reports for cell in cells))
    size = (4.6 * len(tasks), 3.2 * len(reports))
    figure, grid = plt.subplots(len(reports), len(tasks), figsize=size, squeeze=False, layout="constrained")
    try:
        for row, (name, cells, context) in zip(grid, reports, strict=True):
            for axes, task in zip(row, tasks, strict=True):
                own = [cell for cell in cells if cell.task == task]
                if own:
                    draw(axes, own, f"{name}: {task}, % exact", context)
                else:
                    axes.set_axis_off()
        try:
            figure.savefig(path, dpi=130)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space there.") from None
    finally:
        plt.close(figure)
