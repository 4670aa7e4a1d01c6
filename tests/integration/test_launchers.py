"""launch/run_*.sh: what they refuse, the commands they run, and each one's --tiny on CPU processes."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.yaml_file import load_config
from tools.support.local_ranks import RankFailed
from tools.tiny_run import PROCESSES, STOP, compare_losses, main, train

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "run_70b_32k": "llama2_70b_32k",
    "run_13b_64k": "llama2_13b_64k",
    "run_7b_100k": "llama2_7b_100k",
    "run_8b_1m": "llama3_8b_1m",
}
STAND_IN = """#!{bash}
# A Python that writes down how it was called, and fails where it is told to.
echo "$*" >> {log}
[[ "$*" != *"${{FAIL_AT:-nothing}}"* ]] || exit "${{FAIL_CODE:-1}}"
"""
LAUNCHER = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "LONGSPAN_ROOT")


def launch(
    name: str | Path, *arguments: str, cwd: Path = ROOT.parent, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script without a GPU, from a folder that is not the root."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER and not key.startswith("SLURM_")}
    environment = kept | {"CUDA_VISIBLE_DEVICES": "", "LONGSPAN_PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", str(ROOT / "launch" / f"{name}.sh" if isinstance(name, str) else name), *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a stand-in for Python in place; gives the file it writes its calls to."""
    python, log = tmp_path / "python", tmp_path / "calls"
    bash = subprocess.run(["bash", "-c", "command -v bash"], capture_output=True, text=True).stdout.strip()
    python.write_text(STAND_IN.format(bash=bash, log=log))
    python.chmod(0o755)
    monkeypatch.setenv("STAND_IN", str(python))
    return log


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_parses_and_says_what_it_takes(name: str) -> None:
    for file in (f"{name}.sh", "run.sh"):
        assert subprocess.run(["bash", "-n", str(ROOT / "launch" / file)]).returncode == 0
    assert os.access(ROOT / "launch" / f"{name}.sh", os.X_OK)
    told = launch(name, "--help")
    assert told.returncode == 0 and f"launch/configs/{SCRIPTS[name]}.yaml" in told.stdout
    assert all(option in told.stdout for option in ("--dry-run", "--tiny", "--nproc", "--set"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fast"], "unknown argument --fast; --help lists"),
        (["--tiny", "--dry-run"], "exclude each other"),
        (["--nproc"], "--nproc needs a number of processes, got ''"),
        (["--nproc", "0"], "--nproc needs a number of processes, got '0'"),
        (["--set", "train.steps"], "--set needs section.key=value, got 'train.steps'"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], said: str) -> None:
    done = launch("run_70b_32k", *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_python_is_one_sentence() -> None:
    done = launch("run_70b_32k", LONGSPAN_PYTHON="/nowhere/python")
    assert done.returncode == 2 and "/nowhere/python is not there; run launch/setup.sh" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_preflight_refuses_this_machine_before_anything_starts(name: str) -> None:
    done = launch(name, "--nproc", "2", "--set", "output=/nowhere/run")
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("missing: ")]
    assert any("GPUs: PyTorch sees none, and 2 are needed" in line for line in told)
    for setting in ("model.path", "data.path", "eval.path"):
        assert any(line.startswith(f"missing: {setting}: ") for line in told)
    assert "torch.distributed" not in done.stderr and "Preflight" in done.stdout


def test_one_machine_is_checked_then_trained_on_and_the_exit_code_passes_through(calls: Path) -> None:
    python = os.environ["STAND_IN"]
    sets = ["--set", "train.lr=1e-5", "--set", "data.path=my text"]
    assert launch("run_70b_32k", *sets, LONGSPAN_PYTHON=python).returncode == 0
    common = "--config launch/configs/llama2_70b_32k.yaml --set train.lr=1e-5 --set data.path=my text"
    assert calls.read_text().splitlines() == [
        f"-W ignore -m tools.preflight {common} --nproc 8 --nnodes 1",
        f"-W ignore -m tools.torchrun --standalone --nproc-per-node 8 -m pipeline.train {common}",
    ]
    failed = launch("run_70b_32k", LONGSPAN_PYTHON=python, FAIL_AT="pipeline.train", FAIL_CODE="7")
    assert failed.returncode == 7
    calls.unlink()
    refused = launch("run_70b_32k", LONGSPAN_PYTHON=python, FAIL_AT="tools.preflight", FAIL_CODE="2")
    assert refused.returncode == 2 and len(calls.read_text().splitlines()) == 1


def test_several_machines(calls: Path, tmp_path: Path) -> None:
    python = os.environ["STAND_IN"]
    done = launch("run_13b_64k", LONGSPAN_PYTHON=python, NNODES="2", NODE_RANK="1", MASTER_ADDR="head")
    assert done.returncode == 0
    check, start = calls.read_text().splitlines()
    assert check.endswith("--nproc 8 --nnodes 2")
    assert "--nnodes 2 --node-rank 1 --master-addr head --master-port 29500 --nproc-per-node 8" in start
    calls.unlink()

    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n4,n5,n6"}
    slurm["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    assert launch("run_13b_64k", LONGSPAN_PYTHON=python, **slurm).returncode == 0
    assert "--nnodes 3 --node-rank 2 --master-addr n4 --master-port 29500" in calls.read_text().splitlines()[1]
    calls.unlink()

    step = {"SLURM_STEP_NODELIST": "n5,n6", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"}
    assert launch("run_13b_64k", LONGSPAN_PYTHON=python, **slurm | step).returncode == 0
    assert "--nnodes 2 --node-rank 1 --master-addr n5 --master-port 29500" in calls.read_text().splitlines()[1]
    calls.unlink()


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
        (
            {"SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n4,n5"},
            "no scontrol here to ask for machine 0 of n4,n5; set MASTER_ADDR",
        ),
    ],
)
def test_machines_that_cannot_meet(variables: dict[str, str], said: str, calls: Path) -> None:
    done = launch("run_13b_64k", LONGSPAN_PYTHON=os.environ["STAND_IN"], **variables)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not calls.exists()


@pytest.mark.parametrize("name", [*SCRIPTS, "run_tiny"])
def test_a_copy_or_a_link_finds_the_repository(name: str, tmp_path: Path) -> None:
    """sbatch runs a copy."""
    spool, link = tmp_path / "slurm_script", tmp_path / "go"
    shutil.copy(ROOT / "launch" / f"{name}.sh", spool)
    link.symlink_to(ROOT / "launch" / f"{name}.sh")
    for script, variables in (
        (link, {}),
        (spool, {"SLURM_SUBMIT_DIR": str(ROOT)}),
        (spool, {"SLURM_SUBMIT_DIR": "/nowhere", "LONGSPAN_ROOT": str(ROOT)}),
    ):
        told = launch(script, "--help", cwd=tmp_path, **variables)
        assert told.returncode == 0 and f"launch/{name}.sh" in told.stdout, told.stderr
    lost = launch(spool, "--help", cwd=tmp_path, SLURM_SUBMIT_DIR="/nowhere")
    assert lost.returncode == 2
    assert lost.stderr == f"{name}: no /nowhere/launch/run.sh; set LONGSPAN_ROOT to the repository.\n"


def test_python_and_folders_are_seen_from_where_the_user_stands(calls: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "bin").mkdir(parents=True)
    (here / "bin/py").symlink_to(os.environ["STAND_IN"])
    assert launch("run_70b_32k", cwd=here, LONGSPAN_PYTHON="bin/py").returncode == 0
    assert len(calls.read_text().splitlines()) == 2
    calls.unlink()

    for part in ("train", "val"):
        (here / part).mkdir()
    tiny = {"LONGSPAN_PYTHON": "./bin/py", "FAIL_AT": "tools.evaluate"}
    stopped = launch("run_tiny", "--text", ".", "--output", "out", cwd=here, **tiny)
    assert stopped.returncode == 1, stopped.stderr
    call = next(line for line in calls.read_text().splitlines() if "tools.evaluate" in line)
    assert f"data.path={here}/./train " in call and f"output={here}/out " in call
    for arguments, said in ((["--text"], "--text needs a folder"), (["--fast"], "unknown argument --fast; usage: ")):
        wrong = launch("run_tiny", *arguments, cwd=here, **tiny)
        assert wrong.returncode == 2 and said in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_the_other_modes_start_their_tools(calls: Path) -> None:
    python = os.environ["STAND_IN"]
    assert launch("run_7b_100k", "--dry-run", LONGSPAN_PYTHON=python).returncode == 0
    assert launch("run_7b_100k", "--tiny", "--nproc", "2", LONGSPAN_PYTHON=python).returncode == 0
    common = "--config launch/configs/llama2_7b_100k.yaml"
    assert calls.read_text().splitlines() == [
        f"-W ignore -m tools.dry_run {common} --nproc 8",
        f"-W ignore -m tools.tiny_run {common} --nproc 2",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "run_8b_1m"])  # minutes each
def test_tiny_trains_stops_and_resumes_on_this_machine(name: str) -> None:
    config = load_config(ROOT / f"launch/configs/{SCRIPTS[name]}.yaml")
    done = launch(name, "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    first, resumed, expected, *_ = done.stdout.splitlines()
    assert f"engine zero3, {'offload params cpu, optimizer cpu, ' if name == 'run_70b_32k' else ''}tp 1" in first
    assert f"cp {config.parallel.cp} x dp 2 x pp 1" in first and 2 * config.parallel.cp <= PROCESSES
    losses = [float(word) for word in resumed.split(": ")[1].split()]
    assert len(losses) == 2 * STOP and all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx([float(word) for word in expected.split(": ")[1].split()], rel=1e-4)
    assert "PASS: the losses continue" in done.stdout


def test_what_tiny_does_not_pass() -> None:
    expected = (5.0, 4.0, 3.0, 2.0)
    assert not compare_losses((5.0, 4.0, 3.0, 2.0001), expected)
    assert compare_losses((5.0, 4.0), expected) == "2 steps were recorded and 4 were to be trained."
    assert compare_losses((5.0, math.nan, 3.0, 2.0), expected) == "the loss of step 2 is nan."
    assert compare_losses((5.0, 4.0, 5.0, 4.0), expected) == (
        "the loss of step 3, the first after the stop is 5.0000000, and 3.0000000 in one process without a stop."
    )


def test_a_tiny_run_that_cannot_work_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "launch/configs/llama2_70b_32k.yaml")
    assert main(["--config", config, "--set", "parallel.pp=2"]) == 2
    assert "engine zero3 has no pipeline stages" in capsys.readouterr().err
    assert main(["--config", config, "--nproc", "3"]) == 2
    assert "--nproc: 3 is not a multiple of tp x cp x pp = 2" in capsys.readouterr().err
    assert main(["--config", config, "--timeout", "0.2"]) == 1
    assert "FAIL: first-half: still ran after 0.2 s and was ended." in capsys.readouterr().err
    # The launcher's own code is 1; the sentence is the rank's.
    (tmp_path / "run.yaml").write_text("model: {path: nowhere, context: 64}\ndata: {path: x}\noutput: y\n")
    with pytest.raises(RankFailed, match=r"train: missing in .*run\.yaml"):
        train(tmp_path / "run.yaml", 1, tmp_path / "run.log", 120)
