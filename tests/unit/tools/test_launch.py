"""Which machine of how many this is, and what is started on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from tools import launch, torchrun
from tools.launch import Machines, first_host, main, read_machines

SLURM = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[4-6]"}


def host(nodes: str) -> str:
    """What scontrol says of the lists here."""
    return {"n[4-6]": "n4", "n[5-6]": "n5"}[nodes]


@pytest.mark.parametrize(
    ("variables", "machines"),
    [
        ({}, Machines()),
        ({"NNODES": "1", "MASTER_ADDR": "elsewhere"}, Machines()),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head"}, Machines(2, 1, "head", "29500")),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "7"}, Machines(2, 0, "h", "7")),
        (SLURM, Machines(3, 2, "n4", "29500")),
        (SLURM | {"MASTER_ADDR": "other"}, Machines(3, 2, "other", "29500")),
        # A step on some of the job's machines.
        (
            SLURM
            | {"SLURM_STEP_NODELIST": "n[5-6]", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"},
            Machines(2, 1, "n5", "29500"),
        ),
    ],
)
def test_machines(variables: dict[str, str], machines: Machines) -> None:
    assert read_machines(variables, host) == machines


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NNODES": "2"}, "NODE_RANK is not set"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "abc"}, "NNODES must be a number of machines, 1 or more, got 'abc'"),
        ({"NNODES": "0"}, "NNODES must be a number of machines, 1 or more, got '0'"),
        ({"NNODES": "1:4"}, "NNODES must be a number of machines, 1 or more, got '1:4'"),
        ({"NNODES": "2", "NODE_RANK": "5", "MASTER_ADDR": "head"}, "below NNODES, which is 2; got '5'"),
        ({"NNODES": "2", "NODE_RANK": "x", "MASTER_ADDR": "head"}, "below NNODES, which is 2; got 'x'"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "head"}, "below NNODES, which is 1; got '1'"),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}, "use srun --ntasks-per-node=1"),
        ({"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "3"}, "use srun --ntasks-per-node=1"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n4,n5"},
            "the job has 2 machines and this is one of them; start it with srun",
        ),
    ],
)
def test_machines_that_cannot_meet(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_machines(variables, host)
    assert said in str(error.value)


def test_scontrol_is_asked_for_the_first_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no scontrol here to ask for machine 0 of n4,n5; set MASTER_ADDR"):
        first_host("n4,n5")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!{sys.executable}\nimport sys\nprint("\\n".join(sys.argv[3].split(",")))\n')
    scontrol.chmod(0o755)
    assert first_host("n4,n5") == "n4"
    scontrol.write_text(f'#!{sys.executable}\nimport sys\nsys.exit("Invalid hostlist")\n')
    with pytest.raises(ConfigError, match=r"machine 0 of n4,n5 \(Invalid hostlist\); set MASTER_ADDR"):
        first_host("n4,n5")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Words of the preflight and of torchrun, neither of which starts; the environment is put back."""
    calls: list[list[str]] = []
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NNODES", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    # What `prepare_environment` sets is taken back.
    for name in ("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "kept")
    for name in ("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name)

    def run(words: list[str]) -> subprocess.CompletedProcess[bytes]:
        calls.append(words[words.index("-m") + 1 :])
        return subprocess.CompletedProcess(words, 2 if "model.path=missing" in words else 0)

    def torchrun_main(words: list[str]) -> int:
        calls.append(["torchrun", *words])
        return 75

    monkeypatch.setattr(launch.subprocess, "run", run)
    monkeypatch.setattr(torchrun, "main", torchrun_main)
    return calls


def test_the_machine_is_checked_then_trained_on(started: list[list[str]]) -> None:
    run = ["--config", "x.yaml", "--set", "train.lr=1e-5", "--set", "data.path=my text"]
    assert main([*run, "--nproc", "4", "--stop-after", "3"]) == 75
    check, train = started
    assert check == ["tools.preflight", *run, "--nproc", "4", "--nnodes", "1"]
    words = ["--standalone", "--nproc-per-node", "4", "-m", "pipeline.train"]
    assert train == ["torchrun", *words, *run, "--stop-after", "3"]
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1 and os.environ["CUDA_VISIBLE_DEVICES"] == "kept"


def test_what_is_missing_ends_it(started: list[list[str]]) -> None:
    assert main(["--config", "x.yaml", "--nproc", "4", "--set", "model.path=missing"]) == 2
    assert [words[0] for words in started] == ["tools.preflight"]


def test_several_machines_by_options_which_come_before_variables(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_RANK", "0")
    words = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "head", "--master-port", "31000"]
    assert main(["--config", "x.yaml", "--nproc", "8", *words]) == 75
    assert started[0][-4:] == ["--nproc", "8", "--nnodes", "2"]
    assert started[1][1:11] == [*words, "--nproc-per-node", "8"]


def test_several_machines_by_variables(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NNODES", "2"), ("NODE_RANK", "1"), ("MASTER_ADDR", "head"), ("MASTER_PORT", "31000")):
        monkeypatch.setenv(name, value)
    assert main(["--config", "x.yaml", "--nproc", "8"]) == 75
    meet = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "head", "--master-port", "31000"]
    assert started[0][-2:] == ["--nnodes", "2"] and started[1][1:11] == [*meet, "--nproc-per-node", "8"]


def test_machines_that_cannot_meet_start_nothing(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.delenv("NODE_RANK", raising=False)
    assert main(["--config", "x.yaml", "--nproc", "8"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "NODE_RANK" in told[0] and not started


def test_on_a_cpu_there_is_nothing_to_check(started: list[list[str]]) -> None:
    assert main(["--config", "x.yaml", "--nproc", "2", "--device", "cpu"]) == 75
    assert [words[0] for words in started] == ["torchrun"] and os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_machines_without_a_number_of_processes(started: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "x.yaml", "--nnodes", "2"]) == 2
    said = "--nproc: missing; say how many processes each of the machines starts."
    assert capsys.readouterr().err == f"error: {said}\n" and not started


@pytest.mark.parametrize("option", ["--nproc", "--profile", "--stop-after"])
def test_no_process_and_no_step_is_refused(
    option: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--config", "x.yaml", option, "0"])
    assert f"error: {option}: must be a whole number, 1 or more, got '0'" in capsys.readouterr().err and not started
