"""Side by side: what a table says is what the reports hold, differences are paired, losses are told in words."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from parallel.errors import DataError
from pipeline.evaluation.perplexity import EvalReport, LengthResult
from pipeline.evaluation.results import CellResult, RetrievalReport, effective_length, report_path
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
    assert "empty: holds no eval-*.json and no retrieval-*.json; evaluate the run first." in capsys.readouterr().err
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


def test_effective_length_ends_at_the_first_failure() -> None:
    assert effective_length({4096: 0.9, 8192: 0.86, 16384: 0.8, 32768: 0.95}, 0.856) == 8192
    assert effective_length({4096: 0.5}, 0.856) == 0
    assert effective_length({4096: 0.9, 8192: math.nan}, 0.856) == 4096
