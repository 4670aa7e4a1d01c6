"""launch/run_*.sh: what they refuse, the commands they run, and each one's --tiny on CPU processes."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.config.yaml_file import load_config
from tools.launch import parse as launcher_parse
from tools.launch import read_machines
from tools.support.local_ranks import RankFailed
from tools.tiny_run import PROCESSES, STOP, compare_losses, main, train

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "run_70b_32k": "llama2_70b_32k",
    "run_13b_64k": "llama2_13b_64k",
    "run_7b_100k": "llama2_7b_100k",
    "run_8b_1m": "llama3_8b_1m",
    "run_70b_one_gpu": "llama2_70b_one_gpu",
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
        (["--device", "gpu"], "--device needs cpu or cuda, got 'gpu'"),
        (["--tiny", "--device", "cpu"], "--device is for training; --tiny knows what it runs on."),
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


def test_the_settings_and_the_exit_code_pass_through(calls: Path) -> None:
    python = os.environ["STAND_IN"]
    sets = ["--set", "train.lr=1e-5", "--set", "data.path=my text"]
    assert launch("run_70b_32k", *sets, LONGSPAN_PYTHON=python).returncode == 0
    common = "--config launch/configs/llama2_70b_32k.yaml --set train.lr=1e-5 --set data.path=my text"
    assert calls.read_text().splitlines() == [f"-W ignore -m tools.launch {common} --nproc 8"]
    failed = launch("run_70b_32k", LONGSPAN_PYTHON=python, FAIL_AT="tools.launch", FAIL_CODE="7")
    assert failed.returncode == 7


def test_a_yaml_of_ones_own(calls: Path, tmp_path: Path) -> None:
    python = os.environ["STAND_IN"]
    (tmp_path / "mine.yaml").touch()
    assert launch("run", "mine.yaml", "--nproc", "2", cwd=tmp_path, LONGSPAN_PYTHON=python).returncode == 0
    assert launch("run", "mine.yaml", "--device", "cpu", cwd=tmp_path, LONGSPAN_PYTHON=python).returncode == 0
    assert launch("run", "launch/configs/tiny_gpu.yaml", "--tiny", cwd=tmp_path, LONGSPAN_PYTHON=python).returncode == 0
    assert calls.read_text().splitlines() == [
        f"-W ignore -m tools.launch --config {tmp_path}/mine.yaml --nproc 2",
        f"-W ignore -m tools.launch --config {tmp_path}/mine.yaml --nproc 8 --device cpu",
        "-W ignore -m tools.tiny_run --config launch/configs/tiny_gpu.yaml",
    ]
    assert "launch/run.sh CONFIG.yaml [--dry-run" in launch("run", "--help").stdout
    nothing = launch("run", "--nproc", "2", LONGSPAN_PYTHON=python)
    assert nothing.returncode == 2 and nothing.stderr == (
        "run: the first argument is the YAML of a run; --help says more.\n"
    )


@pytest.mark.parametrize("name", [*SCRIPTS, "run_tiny", "run_sft_tiny"])
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
    assert len(calls.read_text().splitlines()) == 1
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
@pytest.mark.parametrize("name", ["run_70b_32k", "run_13b_64k", "run_7b_100k"])  # minutes each
@pytest.mark.usefixtures("forked")
def test_tiny_trains_stops_and_resumes_on_this_machine(name: str, tmp_path: Path) -> None:
    path = ROOT / f"launch/configs/{SCRIPTS[name]}.yaml"
    config = load_config(path)
    # The 13B and 7B runs differ in shape alone: one of them cuts a sequence in two, for two replicas.
    processes = 2 if name == "run_7b_100k" else PROCESSES
    cp = 2 if name == "run_13b_64k" else min(config.parallel.cp, processes)
    words = ["--nproc", str(processes), "--set", f"parallel.cp={cp}"]
    if name == "run_7b_100k":
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.support.preloaded "$@"\n')
        python.chmod(0o755)
        done = launch(name, "--tiny", *words, LONGSPAN_PYTHON=str(python))
    else:
        command = [sys.executable, "-W", "ignore", "-m", "tools.tiny_run", "--config", str(path), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, resumed, expected, *_ = done.stdout[done.stdout.index("tiny run: ") :].splitlines()
    assert f"engine zero3, {'offload params cpu, optimizer none, ' if name == 'run_70b_32k' else ''}tp 1" in first
    assert f"cp {cp} x dp {processes // cp} x pp 1" in first
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


SRUN = """#!{bash}
# Starts what it is told to, in place.
while [[ $1 == --* ]]; do
  echo "srun $1" >> {log}
  shift
done
exec "$@"
"""
RANKS = """#!{bash}
# A run that saves for half a second after the signal, and leaves with 75.
echo "longspan $*" >> {log}
[[ ${{LEAVE:-}} ]] && exit "$LEAVE"
trap 'sleep 0.5; echo saved >> {log}; exit 75' TERM
echo up >> {log}
while :; do sleep 0.05; done
"""


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """srun, scontrol and longspan that write down how they are called; the environment of a job, and the file."""
    bash = subprocess.run(["bash", "-c", "command -v bash"], capture_output=True, text=True).stdout.strip()
    log = tmp_path / "log"
    log.touch()
    for name, text in (("srun", SRUN), ("longspan", RANKS), ("scontrol", '#!{bash}\necho "scontrol $*" >> {log}\n')):
        (tmp_path / name).write_text(text.format(bash=bash, log=log))
        (tmp_path / name).chmod(0o755)
    found = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
    return os.environ | found, log


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True), (138, True), (143, True)])
def test_the_batch_script_requeues_a_run_that_was_stopped(
    code: int, again: bool, slurm: tuple[dict[str, str], Path]
) -> None:
    environment, log = slurm
    words = ["bash", str(ROOT / "launch/slurm.sbatch"), "my run.yaml", "--set", "train.lr=1e-5"]
    assert subprocess.run(words, env=environment | {"LEAVE": str(code)}).returncode == code
    called = "longspan train --config my run.yaml --nproc 4 --set save.signal_exit_code=75 --set train.lr=1e-5"
    started = ["srun --nodes=1", "srun --ntasks-per-node=1", called]
    assert log.read_text().splitlines() == started + ["scontrol requeue 7"] * again


def test_the_batch_script_starts_on_the_machines_that_the_job_was_given(slurm: tuple[dict[str, str], Path]) -> None:
    """Of `sbatch --nodes=2-4` Slurm says how many they are, each time it starts the job."""
    environment, log = slurm
    for given in ("4", "3"):
        words = ["bash", str(ROOT / "launch/slurm.sbatch"), "run.yaml"]
        assert subprocess.run(words, env=environment | {"SLURM_JOB_NUM_NODES": given, "LEAVE": "0"}).returncode == 0
    assert [line for line in log.read_text().splitlines() if "--nodes" in line] == ["srun --nodes=4", "srun --nodes=3"]


def test_preemption_of_the_batch_script_waits_for_the_ranks(slurm: tuple[dict[str, str], Path]) -> None:
    """Slurm sends SIGTERM to the shell and to the ranks."""
    environment, log = slurm
    job = subprocess.Popen(["bash", str(ROOT / "launch/slurm.sbatch"), "run.yaml"], env=environment)
    until = time.monotonic() + 30
    while "up" not in log.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    job.terminate()
    (ranks,) = psutil.Process(job.pid).children()
    ranks.terminate()
    assert job.wait(30) == 75
    assert log.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 7"]


def test_the_manifests_start_what_the_command_takes() -> None:
    """Kubernetes' and SkyPilot's; a word that the command does not know ends `parse`."""
    service, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, name, *words = container["command"]
    args = launcher_parse(words)
    assert (program, name, args.nproc) == ("longspan", "train", container["resources"]["limits"]["nvidia.com/gpu"])
    environment = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    machines = read_machines(environment)
    assert machines.count == job["spec"]["completions"] == job["spec"]["parallelism"] and machines.rank == 1
    # What makes the name of machine 0 known to the others.
    assert machines.head == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    # Kubernetes takes a limit by index with this policy only.
    assert job["spec"]["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    places = {mount["name"] for mount in container["volumeMounts"]}
    assert places == {volume["name"] for volume in pod["volumes"]}

    runtime, train = yaml.safe_load_all((ROOT / "launch/kubernetes_trainjob.yaml").read_text())
    assert train["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    trainer, inner = train["spec"]["trainer"], replicated["template"]["spec"]["template"]["spec"]
    assert trainer["command"] == container["command"], "as of the Indexed Job"
    # Kubernetes' own rule for $(NAME), with what Kubeflow Trainer gives the second machine.
    given = {
        "PET_NNODES": f"{trainer['numNodes']}",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "a",
        "PET_MASTER_PORT": "29500",
    }
    told = [re.sub(r"\$\((\w+)\)", lambda match: given[match[1]], word) for word in trainer["args"]]
    args = launcher_parse([*words, *told])
    assert f"{args.nproc}" == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert (args.nnodes, args.node_rank, args.master_addr, args.master_port) == ("2", "1", "a", "29500")
    assert inner["volumes"] == pod["volumes"] and inner["restartPolicy"] == "Never"
    assert (
        inner["containers"][0]["volumeMounts"] == container["volumeMounts"] and inner["containers"][0]["name"] == "node"
    )
    assert inner["terminationGracePeriodSeconds"] == pod["terminationGracePeriodSeconds"]

    sky = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    program, name, *words = shlex.split(sky["run"])
    args = launcher_parse(words)
    assert (program, name) == ("longspan", "train")
    assert f"{args.nproc}" == sky["resources"]["accelerators"].split(":")[1]
    (place,) = sky["file_mounts"]
    assert args.set == [f"output={place}/run"]


def unknown_fields(sky: dict[str, Any], fields: dict[str, list[str]]) -> list[str]:
    """Fields of a task of SkyPilot's that it does not know, by section."""
    sections = [("task", sky), ("resources", sky["resources"])]
    sections += [("file_mounts", mount) for mount in sky["file_mounts"].values()]
    return [f"{name}.{field}" for name, section in sections for field in section if field not in fields[name]]


def test_skypilot_has_read_its_file() -> None:
    """By its own schemas and its own reader, in another environment: skypilot_golden.py."""
    golden = json.loads(Path(__file__).with_name("skypilot_golden.json").read_text())
    ours = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert unknown_fields(ours, golden["fields"]) == []
    assert ours == golden["yaml"], "it has changed since: run tests/integration/skypilot_golden.py"
    name, count = ours["resources"]["accelerators"].split(":")
    assert golden["read"]["accelerators"] == {name: int(count)} and golden["read"]["nodes"] == 1
    assert golden["read"]["use_spot"] is True and golden["read"]["store"].endswith(" MOUNT_CACHED")
    assert f"SkyPilot {golden['skypilot']}" in (ROOT / "docs/LAUNCH.md").read_text()
    broken = {**ours, "resources": {**ours["resources"], "gpu": 8}, "enviroment": {}}
    assert unknown_fields(broken, golden["fields"]) == ["task.enviroment", "resources.gpu"]
