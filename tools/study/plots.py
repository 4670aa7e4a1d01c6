"""A study's table as a picture: perplexity and retrieval by length, a line a recipe, over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from tools.support.report_plots import KNOWN, OTHER, Style, tokens_label

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
    for at, title, ticks in zip(axes, titles, lengths, strict=True):
        _finish(at, title, sorted(ticks))
    if read:
        least = min(read)
        most = max(value for value in read if value <= LOST * least)
        axes[0].set_yscale("log")
        axes[0].set_ylim(0.93 * least, 1.08 * most)
        digits = 0 if least >= 20 else 1
        axes[0].yaxis.set_major_locator(
            FixedLocator([round(least * (most / least) ** (step / 4), digits) for step in range(5)])
        )
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_locator(NullLocator())
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
    x = sorted(points)
    y = [statistics.fmean(points[length]) for length in x]
    spread = [statistics.stdev(points[length]) if len(points[length]) > 1 else 0.0 for length in x]
    axes.errorbar(
        x,
        y,
        spread,
        color=style.color,
        marker=style.marker,
        linestyle=style.line,
        markersize=4,
        capsize=2,
        linewidth=1.4,
        label=style.title,
    )
    return dict(zip(x, y, strict=True))


def _finish(axes: Axes, title: str, ticks: Sequence[int]) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(True, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens")
    if ticks:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([tokens_label(tick) for tick in ticks])
