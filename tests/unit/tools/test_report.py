"""The report: what is drawn is what was measured, the page stands alone, text is escaped, gaps are told."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from parallel.errors import DataError
from pipeline.evaluation.perplexity import EvalReport, LengthResult
from pipeline.reporting.metrics import METRICS_FILE
from tools.report import PAGE, main, read_run, write_report
from tools.support import report_plots as plots
from tools.support.report_record import evaluation_order

PNG = b"\x89PNG\r\n\x1a\n"


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": math.nan if step == 3 else 5.0 - 0.1 * step,
            "grad_norm": 1.0,
            "lr": 1e-4,
            "tokens": 1000,
            "tokens_per_second": 500.0 * step,
            "seconds": 2.0,
            "memory_gib": 0.5 + 0.01 * step,
            "skipped": int(step >= 3),
        }
        for step in range(1, count + 1)
    ]


def evaluation(label: str, perplexities: dict[int, float], stderr: float | None = 0.01, step: int = 0) -> EvalReport:
    results = []
    for length, perplexity in perplexities.items():
        blocks = 4
        nlls = tuple(math.log(perplexity) + 0.1 * index for index in range(blocks))
        result = LengthResult(
            length, 3, 3 * (length - 1), math.log(perplexity), stderr, length // blocks, nlls, (length,) * blocks
        )
        results.append(result)
    return EvalReport(label, step, None, tuple(results), 61.0)


def make_run(folder: Path) -> Path:
    """A run folder with everything in it."""
    folder.mkdir(parents=True)
    lines = [{key: None if value != value else value for key, value in row.items()} for row in rows()]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation("after", {512: 30.0, 2048: 25.0}, step=70).write(folder / "eval-after.json")
    evaluation("before", {512: 28.0, 2048: 612.0}).write(folder / "eval-before.json")
    evaluation("step-000050", {512: 33.0, 2048: 44.0}, step=50).write(folder / "eval-step-000050.json")
    (folder / "config.yaml").write_text("model:\n  path: a<b>\n  context: 2048\ntrain:\n  trainable: [lora, embed]\n")
    facts = {
        "device": "CPU <test>",
        "commit": "abc123",
        "versions": {"torch": "2.11.0"},
        "parameters": {"total": 1000, "lora": 25},
        "sessions": [{"to_step": 6, "seconds": 3725}],
        "init_from": {"path": "/runs/<first>", "step": 9},
        "changes": [{"step": 4, "setting": "train.lr", "old": 2e-4, "new": 1e-4}],
        "notes": ["It shows <script>alert(1)</script> & more."],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def xs(line: Line2D) -> list[float]:
    return list(np.asarray(line.get_xdata(), dtype=float))


def ys(line: Line2D) -> list[float]:
    return list(np.asarray(line.get_ydata(), dtype=float))


class Page(HTMLParser):
    """Tags with their attributes, and table rows as lists of cell texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell:
            self.rows[-1][-1] += data


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_whole_run_gives_a_page_that_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["--run", str(run)]) == 0
    report = run / "report"
    assert capsys.readouterr().out.strip() == str(report / PAGE)
    page = read_page(report / PAGE)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in images}
    beside = {path.read_bytes() for path in report.glob("*.png")}
    assert len(images) == 4 and embedded == beside and all(png.startswith(PNG) for png in beside)
    assert not [tag for tag, attributes in page.tags if tag in ("script", "link", "iframe") or "href" in attributes]
    for expected in (
        ["context", "before", "step 50", "after step 70"],
        ["512", "28.00 ± 0.28", "33.00 ± 0.33", "30.00 ± 0.30"],
        ["2k", "612.0 ± 6.1", "44.00 ± 0.44", "25.00 ± 0.25"],
        ["optimizer steps", "6 (1 skipped as non-finite)"],
        ["tokens", "6,000"],
        ["loss, mean of last 5 finite ones", "4.6400"],
        ["loss is not finite", "at step 3"],
        ["tokens a second, median", "1,750"],
        ["peak memory, rank 0", "0.56 GiB"],
        ["time in steps", "0:12"],
        ["device", "CPU <test>"],
        ["lora", "25", "2.50 %"],
        ["session to step 6 (loading, training, evaluations)", "1:02:05"],
        ["evaluation, after", "1:01"],
        ["model.path", "a<b>"],
        ["train.trainable", "lora, embed"],
        ["4", "train.lr", "0.0002", "0.0001"],
    ):
        assert expected in page.rows, expected
    assert "Began with the weights of /runs/<first>, step 9." in page.words
    assert "It shows <script>alert(1)</script> & more." in page.words, "shown as text, not run"


@pytest.mark.parametrize("written", [None, "Infinity"])
def test_a_run_that_diverged_says_so(tmp_path: Path, written: str | None) -> None:
    """Metrics write null for what JSON has no number for; other programs write words."""
    run = make_run(tmp_path / "run")
    kept = [json.dumps(row) for row in rows(2)]
    lost = [json.dumps(row | {"loss": None}).replace("null", written or "null") for row in rows(9)[2:]]
    (run / METRICS_FILE).write_text("\n".join([*kept, *lost, ""]))
    page = read_page(write_report(run, tmp_path / "out"))
    assert ["loss is not finite", "at 7 steps from 3 to 9, the last one"] in page.rows
    assert ["loss, mean of last 2 finite ones", "4.8500"] in page.rows and ["loss, first step", "4.9000"] in page.rows
    (run / METRICS_FILE).write_text("\n".join([*lost, ""]))
    page = read_page(write_report(run, tmp_path / "none"))
    assert ["loss, first step", "not finite"] in page.rows and ["loss, mean of last 0 finite ones", "–"] in page.rows


def test_evaluations_come_by_step_whatever_its_digits() -> None:
    keys = ["after", "strength-0.5", "step-1000000", "step-999999", "shipped", "untrained"]
    by_step = ["shipped", "untrained", "step-999999", "step-1000000", "strength-0.5", "after"]
    assert sorted(keys, key=evaluation_order) == by_step


def test_missing_parts_are_told_not_invented(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    evaluation("untrained", {128: 9.0}, stderr=None).write(run / "eval-untrained.json")
    page = read_page(write_report(run, tmp_path / "elsewhere"))
    text = " ".join(page.words)
    for note in ("No metrics.jsonl", "No config.yaml", "No run.json", "No notes"):
        assert note in text
    assert ["128", "9.00"] in page.rows
    assert {path.stem for path in (tmp_path / "elsewhere").glob("*.png")} == {
        "perplexity_by_length",
        "perplexity_by_position",
    }
    (run / "eval-untrained.json").unlink()
    (run / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    page = read_page(write_report(run, tmp_path / "third"))
    assert "No eval-*.json" in " ".join(page.words)
    assert {path.stem for path in (tmp_path / "third").glob("*.png")} == {"loss", "speed_and_memory"}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("run.json", "{", "run.json: cannot be parsed"),
        ("run.json", "[1]", "run.json: holds no named values"),
        ("config.yaml", "a: [", "config.yaml: cannot be parsed"),
        ("eval-after.json", "{}", "eval-after.json: is not an evaluation report"),
        (METRICS_FILE, "oops\n{}\n", "line 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_run(run)


def test_nothing_to_report_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path / "absent")]) == 2
    assert main(["--run", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: --run:") and "is not a folder" in lines[0]
    assert "holds neither metrics.jsonl nor eval-*.json" in lines[1]


def test_not_finite_perplexities_are_named_and_not_drawn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    bad = evaluation("after", {128: 9.0, 256: 9.0})
    broken = EvalReport("after", 1, None, (bad.lengths[0], LengthResult(256, 1, 255, math.nan, None, 64, (), ())), 1.0)
    broken.write(run / "eval-after.json")
    assert ["256", "not finite"] in read_page(write_report(run, tmp_path / "out")).rows
    (axes,) = plots.length_figure({"after": broken}).axes
    assert [xs(line) for line in axes.lines if line.get_marker() == "o"] == [[128]]


def test_loss_plot_shows_the_measured_points_and_marks_skipped_steps() -> None:
    (axes,) = plots.loss_figure(rows()).axes
    curve, skipped = axes.lines
    assert xs(curve) == [1, 2, 4, 5, 6]
    assert ys(curve) == pytest.approx([4.9, 4.8, 4.6, 4.5, 4.4])
    assert xs(skipped) == [3]
    assert axes.get_xlabel() == "optimizer step" and "nats" in axes.get_ylabel()


def test_speed_plot_has_units_and_starts_at_zero() -> None:
    speed, memory = plots.speed_figure(rows()).axes
    assert ys(speed.lines[0]) == [500.0 * step for step in range(1, 7)]
    assert speed.get_ylabel() == "tokens per second" and memory.get_ylabel() == "peak memory (GiB)"
    assert speed.get_ylim()[0] == 0 and memory.get_ylim()[0] == 0


def test_perplexity_axis_is_logarithmic_only_where_the_range_is_large() -> None:
    wide = {"before": evaluation("before", {512: 28.0, 2048: 612.0}), "after": evaluation("after", {512: 30.0})}
    near = {"before": evaluation("before", {512: 28.0}), "after": evaluation("after", {512: 30.0})}
    (axes,) = plots.length_figure(wide).axes
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "perplexity (log scale)"
    (axes,) = plots.length_figure(near).axes
    assert axes.get_yscale() == "linear" and axes.get_ylabel() == "perplexity"


def test_position_plot_uses_the_longest_shared_length_and_block_centres() -> None:
    evaluations = {
        "before": evaluation("before", {512: 28.0, 2048: 40.0}),
        "after": evaluation("after", {512: 30.0, 2048: 25.0, 4096: 26.0}),
    }
    assert plots.longest_shared(evaluations) == 2048
    (axes,) = plots.position_figure(evaluations, original_context=512).axes
    before, after, border = axes.lines
    assert xs(before) == [256, 768, 1280, 1792]
    assert ys(after) == pytest.approx([25.0 * math.exp(0.1 * index) for index in range(4)])
    assert xs(border) == [512, 512]
    assert "2k tokens" in axes.get_title(loc="left")
    apart = {"before": evaluation("before", {512: 28.0}), "after": evaluation("after", {1024: 30.0})}
    assert plots.longest_shared(apart) is None
    with pytest.raises(ValueError, match="share no"):
        plots.position_figure(apart)


def test_curves_differ_in_more_than_colour() -> None:
    keys = {"shipped": 0, "untrained": 0, "step-000020": 20, "step-000040": 40, "after": 60}
    found = list(plots.styles({key: evaluation(key, {512: 9.0}, step=step) for key, step in keys.items()}).values())
    assert len({style.color for style in found}) == len({style.marker for style in found}) == 5
    assert [style.title for style in found][2:4] == ["step 20", "step 40"]
    # Evaluated half-way, or gone on since: the step the weights were of counts, not the file's name.
    (half_way,) = plots.styles({"after": evaluation("after", {512: 9.0}, step=30)}).values()
    assert half_way.title == "after step 30"


@pytest.mark.parametrize(("tokens", "label"), [(8192, "8k"), (131072, "128k"), (1000, "1,000"), (512, "512")])
def test_token_labels(tokens: int, label: str) -> None:
    assert plots.tokens_label(tokens) == label


def test_planned_stands_beside_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Planned and measured" not in write_report(run, tmp_path / "none").read_text()
    record = {
        "name": "zero3, CP8 <x>",
        "seconds": {"products": 1.2, "attention": 0.6},
        "memory": {"weights": 2**29, "logits": 0},
        "allocated": 2**29,
    }
    (run / "plan.json").write_text(json.dumps(record))
    page = write_report(run, tmp_path / "some").read_text()
    # Steps took 2.0 s, of which 1.8 were planned; 0.5 GiB were, and 0.56 were taken.
    for cell in ("Planned and measured", "zero3, CP8 &lt;x&gt;", ">1.8<", ">2<", ">-10.0%<", ">-10.7%<", "0.50 GiB"):
        assert cell in page, cell
    assert "memory: logits" not in page
    (run / "plan.json").write_text('{"seconds": 3}')
    assert "Planned and measured" not in write_report(run, tmp_path / "damaged").read_text()
