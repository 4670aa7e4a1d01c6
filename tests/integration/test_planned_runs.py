"""Runs whose layout the planner chooses, and what they leave for the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pipeline.build
from parallel.world.rank_env import RankEnv
from pipeline.checkpoint.manifest import read_manifest
from pipeline.config.yaml_file import load_config
from pipeline.planner.auto import RECORD
from pipeline.planning.memory import GIB
from pipeline.train import main
from pipeline.training.planned import settled
from tests.numerics.test_training import losses, run_here, write_run

AUTO = ["parallel=auto", "train.recompute=full"]


def test_auto_trains_is_recorded_and_resumes_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, own = write_run(tmp_path, "chosen"), write_run(tmp_path, "own")
    run_here(path, AUTO, stop_after=4)
    assert "parallel: auto chose " in capsys.readouterr().out
    record = json.loads((tmp_path / "chosen" / RECORD).read_text())
    assert record["auto"] and record["ranks"] == 1 and sum(record["seconds"].values()) > 0
    config = read_manifest(tmp_path / "chosen/checkpoints/step-000004").raw["config"]
    assert config["parallel"] == record["layout"]["parallel"] and not config["parallel"]["auto"]
    assert config["train"]["recompute"] == record["layout"]["recompute"]
    # As if another machine had chosen otherwise: a resume keeps to it.
    other = "full" if record["layout"]["recompute"] == "none" else "none"
    record["layout"]["recompute"] = other
    (tmp_path / "chosen" / RECORD).write_text(json.dumps(record))
    run_here(path, AUTO)
    assert "parallel: auto keeps what this run began with" in capsys.readouterr().out
    assert json.loads((tmp_path / "chosen" / RECORD).read_text())["layout"]["recompute"] == other
    assert load_config(tmp_path / "chosen/config.yaml").parallel.auto is False
    run_here(own)
    assert losses(tmp_path / "chosen") == pytest.approx(losses(tmp_path / "own"), rel=1e-5)
    assert json.loads((tmp_path / "own" / RECORD).read_text())["auto"] is False


def test_a_gpu_whose_memory_ran_out_tells_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipeline.build, "build", build)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 78 * GIB)
    assert main(["--config", str(write_run(tmp_path, "run"))]) == 1
    told = capsys.readouterr().err
    assert "out of GPU memory: planned " in told and "allocated 70.0 and reserved 78.0" in told
    assert "Out of GPU memory: CUDA out of memory." in told


def test_a_doomed_run_stops_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.planner.auto import Device
    from pipeline.training import planned

    monkeypatch.setattr(planned, "this_device", lambda env: Device("NVIDIA L40S", GIB // 8, 1, 64 * GIB, 8.9))
    monkeypatch.setattr(pipeline.build, "build", lambda *_, **__: pytest.fail("weights would be read"))
    path = write_run(tmp_path, "run")
    assert main(["--config", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: parallel: megatron, one GPU") and "has 0.1" in said
    assert main(["--config", str(path), "--set", "parallel=auto"]) == 2
    assert "No layout fits" in capsys.readouterr().err
    assert settled(load_config(path), RankEnv())[1] == ""
