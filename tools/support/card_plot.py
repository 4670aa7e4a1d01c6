"""The lengths of a prepared folder's documents as a picture, beside its data card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LENGTHS = "lengths.png"
_BARS = 40


def plot_lengths(folder: Path, lengths: NDArray[np.int64], what: str) -> Path | None:
    """Write a histogram of `lengths` (tokens, [documents], each at least 1) into `folder`; None: no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    shortest, longest = int(lengths.min()), int(lengths.max())
    wide = longest > 20 * shortest  # then only a logarithmic axis shows the short ones
    edges = np.geomspace(shortest, longest + 1, _BARS) if wide else np.linspace(shortest, longest + 1, _BARS)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=edges.tolist(), color="#3b6ea5")
    axes.set(xlabel="tokens", ylabel=what, xscale="log" if wide else "linear")
    axes.set_title(f"{lengths.size:,} {what}, {int(lengths.sum()):,} tokens", fontsize=10)
    out = folder / LENGTHS
    FigureCanvasAgg(figure).print_png(out)
    return out
