"""What is shipped, written where the user stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.init import main

ROOT = Path(__file__).parents[3]


def test_it_writes_what_a_first_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    written = sorted(str(path) for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(listed) == written
    jobs = ("slurm.sbatch", "kubernetes.yaml", "kubernetes_trainjob.yaml", "skypilot.yaml")
    for name in ("configs/tiny_cpu.yaml", "demo/val/moby-dick.txt.xz", *jobs, "nccl.env"):
        assert (tmp_path / "launch" / name).read_bytes() == (ROOT / "launch" / name).read_bytes()
    assert not (tmp_path / "launch/setup.sh").exists(), "which is of the repository"


def test_what_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "launch/configs/tiny_cpu.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert mine.read_text() == "mine" and told.err == f"{mine}: is there already and differs; kept.\n"
    assert main([str(tmp_path)]) == 0 and capsys.readouterr().out == "", "the others are there and alike"


def test_the_repository_has_them_already(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT)]) == 2
    assert "is the repository, which has them" in capsys.readouterr().err
