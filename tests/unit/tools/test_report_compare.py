"""Runs side by side: what differs is shown and nothing else, figures are the runs' own, and gaps stay gaps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import DataError
from pipeline.evaluation.results import CellResult, RetrievalReport
from pipeline.reporting.metrics import METRICS_FILE
from tests.unit.tools.test_report import evaluation, make_run, read_page, rows, xs, ys
from tools.report import main, read_run, write_report
from tools.support import report_plots as plots
from tools.support.report_compare import named


def other_run(folder: Path) -> Path:
    """A run of another learning rate, half as many steps, evaluated at one length, on other text."""
    folder.mkdir(parents=True)
    lines = [row | {"loss": 4.0 - 0.1 * row["step"], "tokens": 3000, "skipped": 0} for row in rows(3)]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation("after", {2048: 20.0}, step=3).write(folder / "eval-after.json")
    evaluation("untrained", {2048: 99.0}).write(folder / "eval-untrained.json")
    (folder / "config.yaml").write_text(
        "model:\n  path: a<b>\n  context: 2048\ntrain:\n  trainable: [lora]\neval:\n  path: other\noutput: elsewhere\n"
    )
    return folder


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path / "one/run"), other_run(tmp_path / "two/run")
    assert main(["--run", str(one), "--compare", str(two), "--output", str(tmp_path / "out")]) == 0
    page = read_page(Path(capsys.readouterr().out.strip()))
    names = ["one/run", "two/run"]
    for expected in (
        ["setting", *names],
        ["train.trainable", "lora, embed", "lora"],
        ["eval.path", "–", "other"],
        ["", *names],
        ["optimizer steps", "6", "3"],
        ["steps skipped", "1", "0"],
        ["tokens", "6,000", "9,000"],
        ["loss, mean of last 10 steps", "4.6400", "3.8000"],
        ["loss is not finite", "at step 3", "never"],
        ["perplexity at 512", "30.00 ± 0.30", "–"],
        ["perplexity at 2k", "25.00 ± 0.25", "20.00 ± 0.20"],
    ):
        assert expected in page.rows, expected
    before = page.rows[: page.rows.index(["", *names])]
    assert not [row for row in before if row[0] in ("model.path", "model.context", "output")], "which are alike"
    assert "Perplexities were not measured alike; what differs: eval.path." in page.words
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {"compared_loss", "compared_perplexity", "loss"} < pictures
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(pictures)
    # Alone it is the page it was.
    assert "side by side" not in write_report(one, tmp_path / "alone").read_text()


def test_retrieval_is_compared_by_task_and_length(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), other_run(tmp_path / "two")
    cells = [
        CellResult("passkey", 2048, depth, scores, (0.1, 0.2), (1.0, 1.0))
        for depth, scores in ((0.0, (1.0, 1.0)), (1.0, (1.0, 0.0)))
    ]
    report = RetrievalReport("after", 3, 4096, 2048, tuple(cells))
    (two / "retrieval-after.json").write_text(json.dumps(report.to_json()))
    (two / "retrieval-untrained.json").write_text(json.dumps(replace(report, cells=tuple(cells[:1])).to_json()))
    page = read_page(write_report(one, tmp_path / "out", [two]))
    assert ["passkey at 2k", "–", "75%"] in page.rows


def test_the_losses_are_drawn_by_tokens() -> None:
    curves = {"a": [(10, 3.0), (20, float("nan")), (30, 1.0)], "b": [(5, 2.0)]}
    (axes,) = plots.compared_loss_figure(curves).axes
    first, second = axes.lines
    assert (xs(first), ys(first)) == ([10, 30], [3.0, 1.0]) and xs(second) == [5]
    assert (first.get_color(), first.get_linestyle()) != (second.get_color(), second.get_linestyle())


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name) for name in ("a/x/run", "a/y/run", "b/x/run")]
    assert [*named([read_run(path) for path in paths])] == ["a/x/run", "a/y/run", "b/x/run"]
    assert [*named([read_run(path) for path in paths[:2]])] == ["x/run", "y/run"]
    with pytest.raises(DataError, match="is given twice"):
        named([read_run(paths[0]), read_run(paths[0])])
