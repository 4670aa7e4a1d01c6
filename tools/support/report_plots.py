"""The report's figures, in Okabe and Ito's colour-blind safe colours; markers and line styles tell curves apart too."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.checkpoint.manifest import folder_name
from pipeline.evaluation.answers import AnswersReport
from pipeline.evaluation.perplexity import EvalReport, LengthResult

LOG_RATIO = 4.0
"""Perplexities spread over more than this ratio are drawn on a logarithmic axis."""

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"


@dataclass(frozen=True)
class Style:
    """How one evaluation is named and drawn."""

    title: str
    color: str
    marker: str
    line: str


KNOWN = {
    "shipped": Style("as shipped", GREY, "s", "--"),
    "before": Style("before", GREY, "s", "--"),
    "untrained": Style("RoPE changed, not trained", ORANGE, "^", ":"),
    "initial": Style("at the start", ORANGE, "^", ":"),
    "after": Style("after training", BLUE, "o", "-"),
}
OTHER = (
    Style("", GREEN, "D", "-."),
    Style("", RED, "v", "-."),
    Style("", "#CC79A7", "P", "-."),
    Style("", BLUE, "o", "-"),
    Style("", ORANGE, "^", "--"),
    Style("", "#56B4E9", "s", ":"),
)


def style_of(key: str, step: int, others: Sequence[str]) -> Style:
    """Style of the evaluation in eval-<key>.json, which was of the weights after `step` optimizer steps.

    The file's name is no proof of that: a run may have gone on since, or been evaluated half-way.

    Args:
        others: the keys without a fixed style, in drawing order.
    """
    if key in KNOWN:
        known = KNOWN[key]
        return replace(known, title=f"after step {step:,}") if key == "after" else known
    base = OTHER[others.index(key) % len(OTHER)]
    title = f"step {step:,}" if key == folder_name(step) else key
    return Style(title, base.color, base.marker, base.line)


def styles(evaluations: Mapping[str, EvalReport] | Mapping[str, AnswersReport]) -> dict[str, Style]:
    """Style of every evaluation."""
    others = [key for key in evaluations if key not in KNOWN]
    return {key: style_of(key, report.step, others) for key, report in evaluations.items()}


def tokens_label(tokens: float) -> str:
    """8192 as 8k, 131072 as 128k, 1000 as 1,000."""
    count = round(tokens)
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def to_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _panel(figure: Figure, title: str, rows: int = 1) -> list[Axes]:
    """Stacked axes sharing x, with a light grid and no box; the title stands over the first."""
    panels = [axes for line in figure.subplots(rows, 1, sharex=True, squeeze=False) for axes in line]
    for axes in panels:
        plain(axes)
    panels[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
    return panels


def plain(axes: Axes) -> None:
    """A light grid and no box."""
    axes.grid(True, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curve(axes: Axes, points: Mapping[int, float], errors: Any, style: Style) -> None:
    """Values by length, with what `errorbar` takes as yerr."""
    axes.errorbar(
        list(points),
        list(points.values()),
        yerr=errors,
        color=style.color,
        marker=style.marker,
        linestyle=style.line,
        markersize=5.5,
        linewidth=1.6,
        capsize=3,
        label=style.title,
    )


def lengths_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Tokens, each length that was measured and no other."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(length) for length in lengths]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_label(value)))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    if len(lengths) == 1:
        axes.set_xlim(lengths[0] / 2, lengths[0] * 2)
    axes.set_xlabel("context length (tokens)")


def _figure(height: float = 3.9) -> Figure:
    return Figure(figsize=(7.4, height), layout="constrained")


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain_log(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers, finely enough for its range."""
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if high / low < 25 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def perplexity_axis(axes: Axes, values: Sequence[float]) -> None:
    """Linear where perplexities are close, logarithmic where not; the label says which."""
    axes.set_ylabel("perplexity")
    if values and max(values) / min(values) > LOG_RATIO:
        axes.set_yscale("log")
        _plain_log(axes.yaxis, min(values), max(values))
        axes.set_ylabel("perplexity (log scale)")


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss over steps; skipped (non-finite) steps are marked on the axis.

    Args:
        rows: lines of metrics.jsonl.
    """
    figure = _figure()
    (axes,) = _panel(figure, "Training loss")
    good = [row for row in rows if math.isfinite(row["loss"])]
    axes.plot(
        [row["step"] for row in good],
        [row["loss"] for row in good],
        color=BLUE,
        linewidth=1.4,
        marker="o" if len(good) <= 60 else "",
        markersize=3,
        label="each step",
    )
    bad = [row["step"] for row in rows if not math.isfinite(row["loss"])]
    if bad:
        axes.plot(bad, [0.02] * len(bad), "x", color=RED, transform=axes.get_xaxis_transform(), label="skipped")
        axes.legend(frameon=False)
    axes.set_ylabel("loss (nats per token)")
    _steps_axis(axes)
    return figure


def compared_loss_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Training losses of several runs over the tokens each has trained on.

    Args:
        curves: (tokens so far, loss) of every step, by the run's name.
    """
    figure = _figure()
    (axes,) = _panel(figure, "Training loss of the runs")
    for number, (name, points) in enumerate(curves.items()):
        style = OTHER[number % len(OTHER)]
        good = [(tokens, loss) for tokens, loss in points if math.isfinite(loss)]
        axes.plot(
            [tokens for tokens, _ in good],
            [loss for _, loss in good],
            color=style.color,
            linestyle=style.line,
            marker=style.marker if len(good) <= 60 else "",
            markersize=3.5,
            linewidth=1.4,
            label=name,
        )
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_ylabel("loss (nats per token)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def speed_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens a second and peak memory over steps, one panel each."""
    figure = _figure(4.8)
    speed, memory = _panel(figure, "Speed and memory", rows=2)
    steps = [row["step"] for row in rows]
    speed.plot(steps, [row["tokens_per_second"] for row in rows], color=BLUE, linewidth=1.4)
    speed.set_ylabel("tokens per second")
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    memory.plot(steps, [row["memory_gib"] for row in rows], color=RED, linewidth=1.4, linestyle="--")
    memory.set_ylabel("peak memory (GiB)")
    for axes in (speed, memory):
        axes.set_ylim(bottom=0)
    _steps_axis(memory)
    return figure


def length_figure(evaluations: Mapping[str, EvalReport]) -> Figure:
    """Perplexity by context length, one curve an evaluation, bars of one standard error."""
    figure = _figure()
    (axes,) = _panel(figure, "Perplexity by context length (full attention)")
    drawn: list[float] = []
    lengths = sorted({result.length for report in evaluations.values() for result in report.lengths})
    for key, style in styles(evaluations).items():
        results = [result for result in evaluations[key].lengths if math.isfinite(result.perplexity)]
        curve(axes, {result.length: result.perplexity for result in results}, _error_bars(results), style)
        drawn += [result.perplexity for result in results]
    lengths_axis(axes, lengths)
    perplexity_axis(axes, drawn)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)  # outside: curves may run anywhere inside
    return figure


def _error_bars(results: Sequence[LengthResult]) -> list[list[float]]:
    """Perplexity's reach of one standard error of the mean nll, below and above."""
    errors = [result.nll_stderr or 0.0 for result in results]
    pairs = list(zip(results, errors, strict=True))
    return [
        [result.perplexity * (1 - math.exp(-error)) for result, error in pairs],
        [result.perplexity * (math.exp(error) - 1) for result, error in pairs],
    ]


def position_figure(evaluations: Mapping[str, EvalReport], original_context: int | None = None) -> Figure:
    """Perplexity by position in the window, at the longest context every evaluation has.

    Args:
        evaluations: by key, in drawing order; they share at least one length.
        original_context: tokens the checkpoint was made for; drawn as a line when it lies inside.
    """
    length = longest_shared(evaluations)
    if length is None:
        raise ValueError("the evaluations share no context length")
    figure = _figure()
    (axes,) = _panel(figure, f"Perplexity by position in a window of {tokens_label(length)} tokens")
    drawn: list[float] = []
    for key, style in styles(evaluations).items():
        (result,) = (result for result in evaluations[key].lengths if result.length == length)
        points = [
            (min((index + 0.5) * result.block, length), value)
            for index, value in enumerate(result.block_perplexity)
            if value is not None and math.isfinite(value)
        ]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=style.color,
            marker=style.marker,
            linestyle=style.line,
            markersize=4.5,
            linewidth=1.6,
            label=style.title,
        )
        drawn += [y for _, y in points]
    if original_context is not None and original_context < length:
        axes.axvline(original_context, color="#444444", linewidth=1, linestyle=(0, (4, 3)), label="original context")
    axes.set_xlim(0, length)
    axes.xaxis.set_major_locator(FixedLocator([length * i / 8 for i in range(9)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_label(value)))
    axes.set_xlabel("position of the predicted token (mean over blocks and windows)")
    perplexity_axis(axes, drawn)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)  # outside: curves may run anywhere inside
    return figure


def longest_shared(evaluations: Mapping[str, EvalReport]) -> int | None:
    """The longest context length that every evaluation has, tokens; None if there is none."""
    sets = [{result.length for result in report.lengths} for report in evaluations.values()]
    return max(set.intersection(*sets), default=None) if sets else None
