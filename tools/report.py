"""Write a run's report: `longspan report --run runs/tiny`. PNG plots, and one HTML page with them inside.

`--compare runs/b runs/c` sets other runs beside it: settings that differ, results, and their curves in one picture.

Reads what a run leaves in its folder: metrics.jsonl, config.yaml, run.json, eval-<key>.json, answers-<key>.json,
retrieval-<key>.json, ruler-<key>.json and gap-<key>.json (key: shipped or before, untrained or initial, step-*, after).
Each is optional; what is missing is named on the page. Of run.json these keys are used where present: title, device,
dtype, world_size, commit, versions, parameters (counts by kind), sessions ([{to_step, seconds}]), timings (name ->
seconds), original_context and base_context (tokens: of the rotary positions; what the base declares), notes (what the
run shows and does not), init_from ({path, step}: the weights it began with), changes ([{step, setting, old, new}]:
settings changed on resume).
"""

from __future__ import annotations

import base64
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pipeline.config.paths import user_path
from pipeline.evaluation.assessment import verdict
from pipeline.evaluation.results import begun_by_length, by_length, by_task
from pipeline.reporting.command import command
from pipeline.reporting.metrics import METRICS_FILE
from pipeline.reporting.parser import Parser
from pipeline.reporting.progress import duration
from pipeline.reporting.words import counted
from tools.support import report_plots as plots
from tools.support.report_answers import answers_section
from tools.support.report_compare import compared_section, draw_compared, named
from tools.support.report_html import CSS, missing, section, show, table
from tools.support.report_plan import planned_lines
from tools.support.report_record import RunRecord, flatten, not_finite, perplexity_cell, read_run
from tools.support.report_ruler import ruler_section

PAGE = "index.html"


def perplexity_section(record: RunRecord, images: Mapping[str, str]) -> str:
    """Perplexities as a table and two plots."""
    if record.answers and not record.evaluations:
        return ""
    if not record.evaluations:
        return section("Perplexity", missing("No eval-*.json: this run was not evaluated (eval.path is not set)."))
    lengths = sorted({length for report in record.evaluations.values() for length in report.perplexity})
    titles = [style.title for style in plots.styles(record.evaluations).values()]
    lines = []
    for length in lengths:
        found = [
            next((perplexity_cell(r) for r in report.lengths if r.length == length), "–")
            for report in record.evaluations.values()
        ]
        lines.append([plots.tokens_label(length), *found])
    some = next(iter(record.evaluations.values()))
    scored = ", ".join(
        f"{plots.tokens_label(r.length)}: {counted(r.windows, 'window')}, {r.tokens:,} tokens" for r in some.lengths
    )
    how = "whole windows" if some.stride is None else f"a sliding window, stride {some.stride:,} tokens"
    return section(
        "Perplexity",
        table(["context", *titles], lines, numbers=True),
        f"<p><small>Full attention, {escape(how)} ({escape(scored)}). ± is one standard error over windows, which lie "
        "in the same text: real uncertainty is larger.</small></p>",
        images.get("perplexity_by_length", ""),
        images.get("perplexity_by_position", missing("By position: the evaluations share no context length.")),
    )


def verdict_section(record: RunRecord) -> str:
    """What was lost against the base, in words; empty where it was not measured."""
    own = record.facts.get("base_context")
    if not isinstance(own, int) or not {"shipped", "after"} <= record.evaluations.keys():
        return ""
    said = verdict(record.folder, own)
    items = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in said)
    return section(f"Against the base at its own lengths, up to {own:,} tokens", f"<ul>{items}</ul>")


def retrieval_section(record: RunRecord) -> str:
    """Retrieval by length and the dense gap; empty where neither was measured."""
    parts = []
    for task in dict.fromkeys(cell.task for report in record.retrieval.values() for cell in report.cells):
        found = {key: by_task(report.cells).get(task, []) for key, report in record.retrieval.items()}
        lengths = sorted({cell.length for cells in found.values() for cell in cells})
        lines = []
        for length in lengths:
            line = [plots.tokens_label(length)]
            for cells in found.values():
                exact, given = by_length(cells), begun_by_length(cells)
                line.append(f"{exact[length][0]:.0%} ({given[length][0]:.0%})" if length in exact else "–")
            lines.append(line)
        parts += [f"<h3>{escape(task)}</h3>", table(["window", *found], lines, numbers=True)]
    if parts:
        note = "Exact answers of greedy decoding; in brackets, once the answer's first token is given."
        parts.append(f"<p><small>{note}</small></p>")
    if record.gaps:
        lines = [[key, f"{gap.mean:+.4f}"] for key, gap in record.gaps.items()]
        length = next(iter(record.gaps.values())).length
        parts += [
            "<h3>Dense gap</h3>",
            f"<p>Loss of windows of {length:,} tokens under full attention less that under S².</p>",
            table(["", "nats a token"], lines, numbers=True),
        ]
    return section("Retrieval", *parts) if parts else ""


def training_section(record: RunRecord, images: Mapping[str, str]) -> str:
    """Loss, speed and memory."""
    rows = record.rows
    if not rows:
        return section("Training", missing(f"No {METRICS_FILE}: this run has not trained."))
    finite = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    tail, broken = finite[-10:], not_finite(rows)
    # The first step of a process pays for warm-up (kernels, caches), so a median is fairer than a mean.
    facts = [
        ("optimizer steps", f"{rows[-1]['step']:,} ({rows[-1]['skipped']} skipped as non-finite)"),
        ("tokens", f"{sum(row['tokens'] for row in rows):,}"),
        ("loss, first step", f"{rows[0]['loss']:.4f}" if math.isfinite(rows[0]["loss"]) else "not finite"),
        (
            f"loss, mean of last {len(tail)} {'finite ones' if broken else 'steps'}",
            f"{statistics.fmean(tail):.4f}" if tail else "–",
        ),
        *([("loss is not finite", broken)] if broken else []),
        ("time in steps", duration(sum(row["seconds"] for row in rows))),
        ("seconds a step, median", f"{statistics.median(row['seconds'] for row in rows):.3g}"),
        ("tokens a second, median", f"{statistics.median(row['tokens_per_second'] for row in rows):,.0f}"),
        ("peak memory, rank 0", f"{max(row['memory_gib'] for row in rows):.2f} GiB"),
    ]
    return section("Training", table([], facts), images.get("loss", ""), images.get("speed_and_memory", ""))


def planned_section(record: RunRecord) -> str:
    """What the planner expected of this layout, beside what was measured; empty where it was not asked."""
    found = planned_lines(record.folder, record.rows)
    if found is None:
        return ""
    name, compared, details = found
    measured = table(["", "planned", "measured", "off by"], compared, numbers=True) if compared else ""
    parts = f"<p>{escape(name)}</p>", measured, table(["", "planned"], details, numbers=True)
    return section("Planned and measured", *parts)


def facts_section(record: RunRecord) -> str:
    """Machine, versions, parameter counts, timings."""
    facts = record.facts
    if not facts:
        return section("Machine and model", missing("No run.json: device, versions and timings are not known."))
    parts = []
    machine: list[tuple[str, str]] = [
        (key, show(facts[key])) for key in ("device", "world_size", "dtype", "commit") if key in facts
    ]
    machine += [(f"version of {name}", show(value)) for name, value in facts.get("versions", {}).items()]
    if machine:
        parts.append(table([], machine))
    counts: dict[str, int] = facts.get("parameters", {})
    total = counts.get("total")
    if counts:
        lines = [[kind, f"{n:,}", f"{100 * n / total:.2f} %" if total else "–"] for kind, n in counts.items()]
        parts += ["<h3>Parameters</h3>", table(["kind", "count", "share"], lines, numbers=True)]
    sessions = facts.get("sessions", [])
    timings = {f"session to step {s['to_step']} (loading, training, evaluations)": s["seconds"] for s in sessions}
    timings |= facts.get("timings", {})
    timings |= {f"evaluation, {key}": report.seconds for key, report in record.evaluations.items()}
    timings |= {f"evaluation of answers, {key}": report.seconds for key, report in record.answers.items()}
    if timings:
        lines = [[name, duration(seconds)] for name, seconds in timings.items()]
        parts += ["<h3>Timings</h3>", table(["part", "time"], lines, numbers=True)]
    return section("Machine and model", *parts)


def notes_section(record: RunRecord) -> str:
    """What the numbers show and what they do not."""
    notes = record.facts.get("notes") or []
    items = "".join(f"<li>{escape(show(note))}</li>\n" for note in notes)
    body = f"<ul>{items}</ul>" if items else missing("No notes in run.json: judge the figures by the settings below.")
    return section("What this shows and what it does not", body)


def history_section(record: RunRecord) -> str:
    """What the run began with, and the settings that changed since; empty where it is one run of one configuration."""
    parts = []
    if begun := record.facts.get("init_from"):
        parts.append(f"<p>Began with the weights of {escape(show(begun['path']))}, step {begun['step']}.</p>")
    if changes := record.facts.get("changes"):
        lines = [[show(c["step"]), show(c["setting"]), show(c["old"]), show(c["new"])] for c in changes]
        parts.append(table(["after step", "setting", "was", "is"], lines))
    return section("Changes on the way", *parts) if parts else ""


def page(
    record: RunRecord, pngs: Mapping[str, tuple[str, bytes]], compared: Mapping[str, RunRecord] | None = None
) -> str:
    """The whole HTML page; nothing in it points outside.

    Args:
        pngs: file stem -> (caption, PNG bytes).
        compared: runs side by side, by name, the page's own first; None: none.
    """
    images = {
        name: f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, (caption, png) in pngs.items()
    }
    title = show(record.facts.get("title") or f"Longspan run: {record.folder.resolve().name}")
    lead = " · ".join(show(record.facts[key]) for key in ("device", "dtype", "commit") if record.facts.get(key))
    settings = [(key, show(value)) for key, value in flatten(record.config).items()]
    config = table(["setting", "value"], settings) if settings else missing("No config.yaml in the run folder.")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        + ("" if compared is None else compared_section(compared, images))
        + verdict_section(record)
        + answers_section(record)
        + perplexity_section(record, images)
        + retrieval_section(record)
        + ruler_section(record.ruler)
        + notes_section(record)
        + training_section(record, images)
        + planned_section(record)
        + history_section(record)
        + facts_section(record)
        + section("Configuration", config)
        + "</body>\n</html>\n"
    )


def draw(record: RunRecord) -> dict[str, tuple[str, bytes]]:
    """PNGs the record has data for: file stem -> (caption, bytes)."""
    drawn: dict[str, tuple[str, bytes]] = {}
    if record.rows:
        drawn["loss"] = "Mean cross entropy of each optimizer step.", plots.to_png(plots.loss_figure(record.rows))
        figure = plots.speed_figure(record.rows)
        drawn["speed_and_memory"] = "All ranks' tokens a second; rank 0's peak memory so far.", plots.to_png(figure)
    if record.evaluations:
        figure = plots.length_figure(record.evaluations)
        drawn["perplexity_by_length"] = "Lower is better; bars are one standard error.", plots.to_png(figure)
        if plots.longest_shared(record.evaluations) is not None:
            figure = plots.position_figure(record.evaluations, record.facts.get("original_context"))
            caption = "A model that uses its context well does not get worse to the right."
            drawn["perplexity_by_position"] = caption, plots.to_png(figure)
    return drawn


def write_report(run: Path, output: Path, others: Sequence[Path] = ()) -> Path:
    """Write PNGs and the page into `output`; returns the page's path.

    Args:
        others: runs to set beside it.

    Raises:
        DataError: nothing to report, or a damaged file.
    """
    record = read_run(run)
    compared = named([record, *map(read_run, others)]) if others else None
    pngs = draw(record) | ({} if compared is None else draw_compared(compared))
    output.mkdir(parents=True, exist_ok=True)
    for name, (_, png) in pngs.items():
        (output / f"{name}.png").write_bytes(png)
    (output / PAGE).write_text(page(record, pngs, compared), encoding="utf-8")
    return output / PAGE


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on standard error."""
    parser = Parser("tools.report", __doc__, "LAUNCH.md")
    parser.add_argument("--run", type=user_path, required=True, help="output folder of a run")
    parser.add_argument("--output", type=user_path, help="where the report goes; <run>/report if not given")
    parser.add_argument(
        "--compare", type=user_path, nargs="+", default=[], metavar="RUN", help="other runs, to be set beside it"
    )
    args = parser.parse_args(argv)
    print(write_report(args.run, args.output or args.run / "report", args.compare))
    return 0


if __name__ == "__main__":
    sys.exit(main())
