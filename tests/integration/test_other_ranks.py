"""An evaluation on other ranks than the run trains on, and two ranks that srun started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.evaluation.perplexity import EvalReport
from tests.integration.test_faults import QUIET, ROOT, finish, mark
from tests.numerics.test_training import losses, run_here, write_run
from tools.evaluate import main

__all__ = ["mark"]
pytestmark = pytest.mark.usefixtures("forked")


def test_a_grid_of_eight_is_evaluated_by_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    held_out = ["--set", f"eval.path={tmp_path / 'text/2.txt'}", "--set", "eval.windows=2"]
    run_here(path, ["train.steps=1"])
    found = []
    for grid in ([], ["parallel.engine=zero3", "parallel.cp=2", "parallel.tp=4"]):
        words = [word for setting in grid for word in ("--set", setting)]
        step = ["--set", "train.steps=1", "--state", "trained"]
        assert main(["--config", str(path), *held_out, *step, *words]) == 0, capsys.readouterr().err
        found.append(EvalReport.read(run / "eval-after.json").perplexity)
        told = capsys.readouterr().err
        assert ("ranks that are here, 1: tp 1 cp 1 pp 1" in told) == bool(grid)
    assert found[0] and found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.started
def test_two_tasks_of_srun_are_one_run(mark: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, "mark")
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    slurm |= {"SLURM_STEP_NUM_NODES": "1"}
    with open(f"{mark}.txt", "wb") as out:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "pipeline.train", "--config", path, "--set", "train.steps=2"]
                + ["--set", "parallel.engine=zero3", "--set", "parallel.cp=2"],
                env=os.environ
                | QUIET
                | slurm
                | {"SLURM_STEP_NUM_NODES": "1"}
                | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
                cwd=ROOT,
                stdout=out,
                stderr=out,
            )
            for rank in "01"
        ]
    ended = finish(mark, ranks)
    assert ended.codes == [0, 0] and "tp 1 cp 2 pp 1 dp 1" in ended.text, ended.text
    assert len(losses(tmp_path / "mark")) == 2
