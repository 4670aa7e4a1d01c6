"""The recorded step: the one asked for, readable by the viewers it is for, and never the end of training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from pipeline.reporting.profile import StepProfile


def steps(profile: StepProfile) -> None:
    for step in range(1, 5):
        with profile.around(step):
            torch.ones(2, 2) @ torch.ones(2, 2) if step == 3 else torch.ones(3).cos()
        if profile.recorded:
            profile.write()


def test_the_step_asked_for_is_recorded(tmp_path: Path) -> None:
    steps(StepProfile(tmp_path / "profile", 5, 3))
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    cuda = ["step-000003-rank-5.memory.pickle"] if torch.cuda.is_available() else []
    assert names == [*cuda, "step-000003-rank-5.trace.json.gz", "step-000003-rank-5.txt"]
    events = json.loads(gzip.open(tmp_path / "profile/step-000003-rank-5.trace.json.gz").read())["traceEvents"]
    operations = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert "aten::mm" in operations and "aten::cos" not in operations
    page = (tmp_path / "profile/step-000003-rank-5.txt").read_text()
    assert page.startswith("step 3, rank 5: ") and "aten::mm" in page


def test_a_folder_that_cannot_be_written_is_said_and_steps_go_on(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    warnings: list[str] = []
    steps(StepProfile(tmp_path / "profile", 0, 2, warnings.append))
    assert len(warnings) == 1 and "step-000002-rank-0" in warnings[0]


def test_writing_is_no_part_of_the_step(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path / "profile", 0, 1)
    with profile.around(1):
        torch.ones(2).cos()
    assert profile.recorded and not (tmp_path / "profile").exists()
    profile.write()
    assert not profile.recorded and len(list((tmp_path / "profile").iterdir())) >= 2
    profile.write()


def test_a_step_that_fails_is_not_recorded(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path / "profile", 0, 1)
    with pytest.raises(ValueError, match="planted"), profile.around(1):
        raise ValueError("planted")
    assert not profile.recorded
    steps(StepProfile(tmp_path / "other", 0, 3))
    assert (tmp_path / "other/step-000003-rank-0.txt").is_file(), "the recorder is free again"
