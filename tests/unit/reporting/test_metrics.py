"""Metrics that survive kills and resumes, and a display that suits terminals and log files."""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.errors import DataError
from pipeline.reporting.metrics import (
    FIELDS,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    MetricsWriter,
    peak_memory_gib,
    read_metrics,
)
from pipeline.reporting.progress import EvalProgress, TrainProgress, duration


def row(step: int, loss: float = 2.5) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-4,
        "tokens": 512,
        "tokens_per_second": 1024.0,
        "seconds": 0.5,
        "memory_gib": 1.25,
        "skipped": 0,
    }


def write(folder: Path, resume_step: int, steps: range, loss: float = 2.5) -> None:
    # TensorBoard reads files in the order of their names: a second, and then a count by letters, where 10 is before 9.
    while any(f".{int(time.time())}." in path.name for path in (folder / TENSORBOARD_FOLDER).glob("*")):
        time.sleep(0.05)
    with MetricsWriter(folder, resume_step) as writer:
        for step in steps:
            writer.write(row(step, loss))


def board(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) points a TensorBoard would show."""
    events = EventAccumulator(str(folder / TENSORBOARD_FOLDER))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def test_lines_are_flushed_one_by_one_and_complete(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", 0) as writer:
        for step in (1, 2):
            writer.write(row(step))
            lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
            assert len(lines) == step
            assert list(json.loads(lines[-1])) == list(FIELDS)
    assert read_metrics(tmp_path / "run" / METRICS_FILE) == [row(1), row(2)]


def test_resume_replaces_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8), loss=5.0)
    write(tmp_path, 4, range(5, 11), loss=3.0)
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [r["step"] for r in rows] == list(range(1, 11))
    assert [r["loss"] for r in rows] == [5.0] * 4 + [3.0] * 6
    assert board(tmp_path, "train/loss") == [(step, 5.0 if step <= 4 else 3.0) for step in range(1, 11)]


def test_starting_over_drops_an_old_runs_lines(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), loss=9.0)
    write(tmp_path, 0, range(1, 3))
    assert read_metrics(tmp_path / METRICS_FILE) == [row(1), row(2)]
    assert board(tmp_path, "train/loss") == [(1, 2.5), (2, 2.5)]


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_a_torn_last_line_is_repaired(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 0, range(1, 6))
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    whole = 5 if cut == 1 else 4  # one byte is only the newline
    assert [r["step"] for r in read_metrics(path)] == list(range(1, whole + 1))
    write(tmp_path, 5, range(6, 8))
    assert [r["step"] for r in read_metrics(path)] == [*range(1, whole + 1), 6, 7]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_middle_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(json.dumps(row(1)) + "\n{oops\n" + json.dumps(row(3)) + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    with pytest.raises(DataError, match="line 2"):
        MetricsWriter(tmp_path, 1)
    with pytest.raises(DataError, match="absent.jsonl"):
        read_metrics(tmp_path / "absent.jsonl")


def test_non_finite_values_stay_valid_json(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 2), loss=math.nan)
    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(read_metrics(tmp_path / METRICS_FILE)[0]["loss"])


def test_a_missing_field_is_a_bug_and_perplexity_reaches_tensorboard(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0) as writer:
        with pytest.raises(KeyError, match="grad_norm"):
            writer.write({"step": 1, "loss": 1.0})
        writer.write_evaluation(3, {"perplexity/128": 20.0, "perplexity/512": 30.0})
    assert board(tmp_path, "perplexity/512") == [(3, 30.0)]
    assert read_metrics(tmp_path / METRICS_FILE) == []


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_memory_gib()
    held = torch.ones(64 * 2**20 + int(before * 2**28), dtype=torch.float32)  # tops any earlier peak
    if torch.cuda.is_available():
        held = held.cuda()
    assert peak_memory_gib() >= held.numel() * 4 / 2**30 > before


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_log_files_get_few_plain_lines() -> None:
    out = console(terminal=False)
    with TrainProgress(25, 3, every=10, console=out) as progress:
        for step in range(4, 26):
            progress.update(step, row(step) | {"skipped": 2 if step == 25 else 0})
        with EvalProgress(2, "perplexity [after]", console=out, clock=iter([0.0, 0.0, 65.0]).__next__) as shown:
            shown.advance()
            shown.advance()
    lines = text_of(out).splitlines()
    assert lines[0] == "step 4/25  loss 2.5000  1,024 tokens/s  1.25 GiB  0:10 left"
    assert [line.split()[1] for line in lines[:-1]] == ["4/25", "10/25", "20/25", "25/25"]
    assert lines[-2].endswith("0:00 left  2 skipped")
    assert lines[-1] == "perplexity [after]: 2 windows in 1:05"
    assert "\x1b" not in text_of(out)


def test_a_step_of_minutes_moves() -> None:
    out = console(terminal=False)
    clock = iter([0.0, 30.0, 61.0, 90.0, 125.0])
    with TrainProgress(2, console=out, clock=lambda: next(clock)) as progress:
        for done in range(1, 5):
            progress.within(1, done, 9)
    assert text_of(out).splitlines() == ["step 1/2  2 of 9 passes done", "step 1/2  4 of 9 passes done"]
    live = console(terminal=True)
    with TrainProgress(2, console=live) as progress:
        progress.within(1, 3, 9)
    assert "step 1: 33%" in text_of(live)


def test_a_terminal_gets_a_live_bar_also_around_an_evaluation() -> None:
    out = console(terminal=True)
    with TrainProgress(4, console=out) as progress:
        for step in (1, 2, 3, 4):
            progress.update(step, row(step))
            if step == 2:
                with EvalProgress(3, "perplexity", console=out) as shown:
                    for _ in range(3):
                        shown.advance()
    text = text_of(out)
    assert "\x1b" in text and "4/4" in text and "1,024 tokens/s" in text and "perplexity: 3 windows in 0:00" in text


def test_other_ranks_are_silent() -> None:
    out = console(terminal=True)
    with TrainProgress(2, enabled=False, console=out) as progress, EvalProgress(1, enabled=False, console=out) as shown:
        progress.update(1, row(1))
        progress.say("hello")
        shown.advance()
    assert text_of(out) == ""


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
