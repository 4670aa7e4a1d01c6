"""A display and files beside the training state that fail: told once, and the run goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.reporting import metrics as metrics_module
from pipeline.reporting.lasting import optional_file
from pipeline.reporting.metrics import METRICS_FILE, MetricsWriter, read_metrics
from tests.unit.reporting.test_metrics import row

SHOW = """
import sys
from pipeline.reporting.progress import EvalProgress, TrainProgress, TokenProgress
with TrainProgress(400, every=1) as progress:
    progress.say("begun")
    for step in range(1, 401):
        progress.update(step, {"step": step, "loss": 1.0, "tokens_per_second": 1.0, "seconds": 1.0, "memory_gib": 1.0})
    with EvalProgress(1, "perplexity") as shown:
        shown.advance()
print("trained to the end", file=sys.stderr)
"""


def shown_to(stdout: Any, terminal: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a process that shows a whole run there."""
    environment = os.environ | ({"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"} if terminal else {})
    found = subprocess.run(
        [sys.executable, "-c", SHOW], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
    )
    return found.returncode, found.stderr


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bar"])
@pytest.mark.parametrize("where", ["broken pipe", "full disk"])
def test_a_display_that_goes_away_is_told_once(where: str, terminal: bool) -> None:
    if where == "full disk":
        with open("/dev/full", "w") as full:
            code, told = shown_to(full, terminal)
        why = "No space left on device"
    else:
        reading, writing = os.pipe()
        os.close(reading)
        code, told = shown_to(writing, terminal)
        os.close(writing)
        why = "Broken pipe"
    assert code == 0 and "trained to the end" in told, told
    assert told.count(f"warning: standard output cannot be written ({why}); training goes on") == 1
    assert "Traceback" not in told and "Exception" not in told


def test_metrics_wait_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with MetricsWriter(tmp_path, 0, told.append) as writer:
        writer.write(row(1))
        real, room = os.pwrite, [30]

        def half(handle: int, data: bytes, offset: int) -> int:
            """What a disk with a few bytes left does: part of a line, and then nothing."""
            if room:
                return real(handle, data[: room.pop()], offset)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(metrics_module.os, "pwrite", half)
        writer.write(row(2))
        writer.write(row(3))
        assert [r["step"] for r in read_metrics(tmp_path / METRICS_FILE)] == [1], "a torn line is no line"
        monkeypatch.setattr(metrics_module.os, "pwrite", real)
        writer.write(row(4))
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]
    assert all(json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())
    assert len(told) == 1 and f"{METRICS_FILE}: cannot be written (No space left on device)" in told[0]


def test_metrics_that_can_never_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    with MetricsWriter(tmp_path / "file", 0, told.append) as writer:  # no folder can be made there
        for step in (1, 2, 3):
            writer.write(row(step))
        writer.write_evaluation(3, {"perplexity/128": 9.0})
    assert len(told) == 3 and "lacks the last 3 lines" in told[2]
    assert "tensorboard: cannot be written" in told[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_is_given_up_alone(tmp_path: Path) -> None:
    told: list[str] = []
    with MetricsWriter(tmp_path, 0, told.append) as writer:
        writer.write(row(1))
        board = writer._board
        assert board is not None
        board.flush()

        def refuse(data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        # Where its thread hands bytes to the file system.
        board.file_writer.event_writer._async_writer._worker._record_writer.write = refuse
        for step in range(2, 30):
            writer.write(row(step))
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_FILE)] == list(range(1, 30))
    assert len(told) == 1 and "without further points there" in told[0]


def test_other_files_beside_the_state(tmp_path: Path) -> None:
    told: list[str] = []
    with optional_file(tmp_path / "run.json", told.append):
        (tmp_path / "absent" / "run.json").write_text("{}")
    assert told == [
        f"{tmp_path / 'run.json'}: cannot be written (No such file or directory); training goes on without it."
    ]
    with pytest.raises(ZeroDivisionError), optional_file("x"):
        _ = 1 / 0
