"""A plan's memory as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.planner.choose import Candidate
from pipeline.planner.explain import named
from pipeline.planner.footprint import KINDS, by_stage
from pipeline.planning.memory import GIB

COLORS = (
    *("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00"),
    *("#CC79A7", "#8C8C8C", "#4D4D4D", "#000000", "#CFCFCF"),
)
"""Okabe and Ito's, then greys: one of KINDS each."""
MOST_BARS = 64
TITLE = 60
"""Letters that a line over the bars has room for."""


def memory_figure(candidate: Candidate) -> Figure:
    """A bar a rank, stacked by kind, under the line of what a GPU has; of many ranks the first of each stage."""
    plan, site = candidate.plan, candidate.site
    stages = by_stage(plan, site.a_node)
    world = plan.grid.world_size
    ranks = range(world) if world <= MOST_BARS else range(0, world, world // plan.grid.pp)
    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    axes = figure.subplots()
    bottoms = [0.0] * len(ranks)
    for kind, color in zip(KINDS, COLORS, strict=True):
        heights = [stages[plan.grid.coordinates(rank).pp][kind] / GIB for rank in ranks]
        if any(heights):
            axes.bar([str(rank) for rank in ranks], heights, bottom=bottoms, color=color, label=kind, width=0.8)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.axhline(site.gpu.memory / GIB, color="#D55E00", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"{site.gpu.name}: {site.gpu.memory / GIB:.1f} GiB", (0, site.gpu.memory / GIB), xytext=(4, 3),
        textcoords="offset points", fontsize=8, color="#D55E00",
    )  # fmt: skip
    axes.set_title(textwrap.fill(named(plan), TITLE), loc="left", fontsize=9, fontweight="bold")
    axes.set_xlabel("rank")
    axes.set_ylabel("GiB")
    axes.set_ylim(0, 1.1 * max(site.gpu.memory / GIB, *bottoms))
    axes.spines[["top", "right"]].set_visible(False)
    if len(ranks) > 16:
        axes.set_xticks(range(0, len(ranks), 8))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles=handles[::-1], labels=labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    return figure


def write_memory(candidate: Candidate, path: Path) -> None:
    """Write `memory_figure` as PNG."""
    memory_figure(candidate).savefig(path, format="png", dpi=150)
