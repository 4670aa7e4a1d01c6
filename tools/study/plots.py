"""A study's table as a picture: perplexity and retrieval by length, a line a recipe, over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.support.report_plots import KNOWN, OTHER, Style, curve, lengths_axis, perplexity_axis, plain

LOST = 10.0
"""Perplexities beyond this many times the least are of a model that reads nothing: no axis is stretched for them."""
Points = dict[int, list[float]]
"""Values of several seeds by length."""


def drawn(found: Mapping[str, Any]) -> Figure:
    """Perplexity left, retrieval of every task right: means over seeds, ± standard deviations.

    Args:
        found: what `table.figures` gives, or its JSON file's content.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for run in found["runs"]:
        rows.setdefault(run["recipe"], []).append(run)
    tasks = list(dict.fromkeys(task for run in found["runs"] for task in run["retrieval"]))
    figure = Figure(figsize=(5.2 * (1 + len(tasks)), 3.6 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 1 + len(tasks), squeeze=False)[0]
    styles = _styles(list(rows), found["base"])
    read: list[float] = []
    lengths: list[set[int]] = [set() for _ in axes]
    for name, runs in rows.items():
        means = _line(axes[0], [run["perplexity"] for run in runs], styles[name])
        read += means.values()
        lengths[0] |= means.keys()
        for place, task in enumerate(tasks, 1):
            scores = [run["retrieval"].get(task, {}) for run in runs]
            exact = [{length: 100 * cell["exact"] for length, cell in seed.items()} for seed in scores]
            lengths[place] |= _line(axes[place], exact, styles[name]).keys()
    titles = "Perplexity", *(f"{task}, % exact" for task in tasks)
    for at, title, measured in zip(axes, titles, lengths, strict=True):
        plain(at)
        at.set_title(title, loc="left", fontsize=11, fontweight="bold")
        if measured:
            lengths_axis(at, sorted(measured))
    if read:
        least = min(read)
        sensible = [value for value in read if value <= LOST * least]
        perplexity_axis(axes[0], sensible)
        axes[0].set_ylim(0.93 * least, 1.08 * max(sensible))
    for at in axes[1:]:
        at.set_ylim(-4, 104)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _styles(names: Sequence[str], base: str | None) -> dict[str, Style]:
    """The base as evaluations draw it, recipes in turn."""
    others = [name for name in names if name != base]
    known = {base: KNOWN["shipped"]} if base is not None else {}
    found = known | {name: OTHER[place % len(OTHER)] for place, name in enumerate(others)}
    return {name: replace(style, title=name) for name, style in found.items()}


def _line(axes: Axes, seeds: Sequence[Mapping[str, float | None]], style: Style) -> dict[int, float]:
    """Draws values by length, and gives their means."""
    points: Points = {}
    for seed in seeds:
        for length, value in seed.items():
            if value is not None and math.isfinite(value):
                points.setdefault(int(length), []).append(value)
    means = {length: statistics.fmean(points[length]) for length in sorted(points)}
    curve(axes, means, [statistics.stdev(points[n]) if len(points[n]) > 1 else 0.0 for n in means], style)
    return means
