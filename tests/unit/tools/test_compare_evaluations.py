"""Side by side: what a table says is what the reports hold, differences are paired, losses are told in words."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from parallel.errors import DataError
from pipeline.evaluation.perplexity import EvalReport, LengthResult
from pipeline.evaluation.results import CellResult, RetrievalReport, report_path
from pipeline.evaluation.ruler.results import RulerReport, RulerResult, effective_length, ruler_path
from tools.compare_evaluations import against, read_evaluated, sentences, tables
from tools.evaluate import PICTURE, main

BASE = {100: (3.0, 3.4, 3.2), 200: (3.1, 3.3, 3.5)}
"""Losses of three windows by length."""


def perplexity(label: str, step: int, losses: dict[int, tuple[float, ...]]) -> EvalReport:
    results = tuple(
        LengthResult(length, len(own), 10, float(np.mean(own)), 0.1, 10, (1.0,), (10,), own)
        for length, own in losses.items()
    )
    return EvalReport(label, step, None, results, 1.0)


def retrieval(label: str, step: int, scores: dict[tuple[int, float], tuple[float, ...]]) -> RetrievalReport:
    cells = tuple(
        CellResult("passkey-grass-5", length, depth, own, (0.5,) * len(own), own)
        for (length, depth), own in scores.items()
    )
    return RetrievalReport(label, step, 400, 200, cells)


def write(folder: Path, *reports: EvalReport | RetrievalReport) -> Path:
    for report in reports:
        if isinstance(report, EvalReport):
            report.write(folder / f"eval-{report.label}.json")
        else:
            report.write(report_path(folder, report.label))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(
        tmp_path / "run",
        perplexity("shipped", 0, BASE),
        perplexity("after", 9, {100: (3.2, 3.5, 3.5), 200: (3.0, 3.3, 3.4)}),
        perplexity("untrained", 0, {100: (9.0, 9.0, 9.0)}),
        retrieval("shipped", 0, {(100, 0.0): (1, 1), (100, 1.0): (1, 1), (200, 0.0): (0, 0), (400, 0.0): (0, 0)}),
        retrieval("after", 9, {(100, 0.0): (1, 0), (100, 1.0): (1, 1), (200, 0.0): (1, 1), (400, 0.0): (1, 0)}),
    )


def shown(folders: list[Path]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for table in tables(read_evaluated(folders)):
        console.print(table)
    return out.getvalue()


def test_parts_of_the_training_stand_in_order_and_say_a_step_that_is_past(folder: Path) -> None:
    for part, step in (("0.5", 9), ("0", 9), ("0.25", 7)):
        write(folder, perplexity(f"strength-{part}", step, BASE))
    labels = [one.label for one in read_evaluated([folder])]
    assert labels == ["shipped", "untrained", "strength-0.25", "strength-0", "strength-0.5", "after"]
    lines = shown([folder]).splitlines()
    assert any("strength-0.25 of step 7" in line for line in lines)
    assert not any("strength-0.5 of step" in line for line in lines), "of the run's last"


def test_differences_are_of_the_same_windows(folder: Path) -> None:
    order = [one.label for one in read_evaluated([folder])]
    assert order == ["shipped", "untrained", "after"]
    by_label = {one.label: one.perplexity for one in read_evaluated([folder])}
    base, after = by_label["shipped"], by_label["after"]
    assert base is not None and after is not None
    differences = np.array([0.2, 0.1, 0.3])
    ratio = math.exp(differences.mean())
    error = 100 * ratio * differences.std(ddof=1) / math.sqrt(3)
    assert against(after, base, 100) == f"{ratio - 1:+.1%} ± {error:.1f}"
    assert against(after, base, 400) == "", "not measured"
    fewer = perplexity("x", 1, {100: (3.0, 3.1)})
    assert against(fewer, base, 100) == "", "other windows"


def test_the_table_shows_what_the_reports_hold(folder: Path) -> None:
    text = shown([folder])
    assert f"{math.exp(3.2):.2f}" in text and "trained" in text and "as shipped" in text
    (row,) = [line for line in text.split("Retrieval")[1].splitlines() if "│ trained" in line]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells == ["trained", "75 ± 25", "100", "50 ± 50", "50 at 100, depth 0%"]


def test_losses_are_told(folder: Path) -> None:
    told = sentences(read_evaluated([folder]))
    assert told == [
        f"run, RoPE stretched, untrained: reads 100 tokens {math.exp(5.8) - 1:.1%} worse than the base does.",
        "run, trained: passkey-grass-5 at 100 tokens: 75% where the base has 100% (4 prompts): retrieval that the base "
        "had is lost.",
        "run, trained: passkey-grass-5 at 200 tokens: the base scores 0 here: nothing to lose or win.",
        f"run, trained: reads 100 tokens {math.exp(0.2) - 1:.1%} worse than the base does.",
    ]
    assert not any("400 tokens" in sentence for sentence in told), "the base was not made for it"


def test_folders_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "other", perplexity("after", 5, {100: (2.0, 2.0, 2.0)}))
    assert "other: trained" in shown([folder, other])
    assert main(["--compare", str(folder), str(other)]) == 0
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert "other: trained" in capsys.readouterr().out


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["--compare", str(tmp_path / "empty")]) == 2
    told = capsys.readouterr().err
    assert "empty: holds no eval-*.json, no answers-*.json, no retrieval-*.json and no ruler-*.json; evaluate" in told
    report_path(tmp_path, "after").write_text('{"label": "after"}')
    with pytest.raises(DataError, match="retrieval-after.json: is not a retrieval report.*evaluate again"):
        read_evaluated([tmp_path])
    for arguments in (
        ["--model", "x"],
        ["--state", "trained"],
        [],
        ["--config", "x", "--compare", "--state", "shipped"],
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    assert main(["--model", str(tmp_path / "no"), "--text", "t", "--output", "o"]) == 2
    assert "--model: " in capsys.readouterr().err


def ruler(label: str, scores: dict[str, dict[int, tuple[float, ...]]]) -> RulerReport:
    cells = [
        RulerResult(task, length, own, ("said",) * len(own))
        for task, lengths in scores.items()
        for length, own in lengths.items()
    ]
    return RulerReport(label, 0, 800, 200, tuple(cells))


def test_effective_length_is_judged_by_what_the_base_can_do(folder: Path) -> None:
    base = ruler(
        "shipped", {"vt": {100: (1.0,), 200: (0.5, 0.7), 400: (0.0,)}, "cwe": {200: (0.8,)}, "fwe": {200: (0.0,)}}
    )
    after = ruler(
        "after",
        {
            "vt": {100: (0.6,), 200: (0.7,), 400: (0.9,), 800: (0.1,)},
            "cwe": {100: (0.8,), 200: (0.7,), 400: (0.5,), 800: (0.1,)},
            "fwe": {100: (0.0,), 200: (0.0,), 400: (0.0,), 800: (0.0,)},
        },
    )
    reached = after.effective(base)
    assert (reached.tokens, reached.tasks) == (400, ("vt", "cwe")) and reached.threshold == pytest.approx(0.7)
    assert reached.criterion == "the base's own score at 200 tokens"
    assert base.effective(base).tokens == 200
    alone = after.effective(None)
    assert (alone.tokens, alone.threshold, alone.criterion) == (0, 0.856, "RULER's threshold")
    useless = ruler("shipped", {"vt": {200: (0.0,)}})
    assert after.effective(useless) == alone, "no threshold of 0"
    base.write(ruler_path(folder, "shipped"), base)
    after.write(ruler_path(folder, "after"), base)
    assert RulerReport.read(ruler_path(folder, "after")) == after
    kept = json.loads(ruler_path(folder, "after").read_text())
    assert kept["effective_length"]["tokens"] == 400 and kept["effective_length"]["tasks"] == ["vt", "cwe"]
    text = shown([folder])
    (row,) = [line for line in text.splitlines() if "│ trained" in line and "mean" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["trained", "mean", "47", "47", "47", "7"]
    reads = " ".join(text.split())
    assert "trained: effective length 400 tokens: 70.0% or more over 2 tasks (the base's own score at 200" in reads
    told = sentences(read_evaluated([folder]))
    assert "run, trained: fwe at 200 tokens: the base scores 0 here: nothing to lose or win." in told
    assert any("cwe at 200 tokens: 70% where the base has 80% (1 prompt)" in sentence for sentence in told)
    assert main(["--compare", str(folder)]) == 0
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    ruler_path(folder, "after").write_text("{}")
    with pytest.raises(DataError, match="ruler-after.json: is no RULER report.*evaluate again"):
        read_evaluated([folder])


def test_effective_length_ends_at_the_first_failure() -> None:
    assert effective_length({4096: 0.9, 8192: 0.86, 16384: 0.8, 32768: 0.95}, 0.856) == 8192
    assert effective_length({4096: 0.5}, 0.856) == 0
    assert effective_length({4096: 0.9, 8192: math.nan}, 0.856) == 4096
