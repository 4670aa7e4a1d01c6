"""Signals, to ranks and through launch/run.sh, and SIGKILL at random instants, on real ranks: saved at one step,
resumed to the bit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest

from parallel.errors import ConfigError
from parallel.health.signals import exit_code
from parallel.world.rank_env import EXIT_FILE, RankEnv
from pipeline.checkpoint.choose import choose
from pipeline.training.lock import OutputLock
from tests.integration.test_faults import QUIET, ROOT, finish, mark, start
from tests.numerics.test_training import losses, run_here, write_run
from tests.support.ranks import reserved_port

__all__ = ["mark"]
pytestmark = pytest.mark.usefixtures("forked")
STEPS = 12


def wait_for_step(folder: Path, step: int) -> None:
    until = time.monotonic() + 180
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_on_all(number: signal.Signals, mark: str, tmp_path: Path) -> None:
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    options = ["--config", path, "--set", "train.steps=5000", "--set", "save.every=0"]
    options += ["--set", "save.signal_exit_code=75"] if number == signal.SIGUSR1 else []
    ranks = start(mark, "none", 0, 0, *options, torchrun=False)
    wait_for_step(run, 3)
    ranks[1].send_signal(number)
    began = time.monotonic()
    ended = finish(mark, ranks)
    assert ended.codes == ([75, 75] if number == signal.SIGUSR1 else [0, 0]), ended.text
    assert time.monotonic() - began < 30
    done = len(losses(run))
    choice = choose(run / "checkpoints")
    assert choice is not None and choice.step == done and not choice.warnings
    assert f"{number.name}: stopped and saved at step {done}; rerun the same command" in ended.text
    assert not (run / ".lock").exists()


def launch(mark: str, path: Path, *settings: str, script: bool = False) -> subprocess.Popen[bytes]:
    """The launcher on two CPU processes, in a session of its own.

    Args:
        script: started by launch/run.sh.
    """
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-W", "ignore", "-m", "tools.launch", "--config", str(path), "--device", "cpu", *words]
    with open(f"{mark}.txt", "wb") as out:
        streams = {"stdout": out, "stderr": out}
        if not script:
            environment = os.environ | QUIET
            return subprocess.Popen(
                [*command, "--nproc", "2"], cwd=ROOT, env=environment, start_new_session=True, **streams
            )
        return launch_script(path, words, streams)


def launch_script(path: Path, words: list[str], streams: dict[str, BinaryIO]) -> subprocess.Popen[bytes]:
    """launch/run.sh with words for two CPU processes."""
    python, script = path.parent / "python", path.parent / "run_test.sh"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *tools.launch*) set -- "$@" --device cpu ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    script.write_text(f"name=run_test config={path}\nsource {ROOT}/launch/run.sh\n")
    environment = os.environ | QUIET | {"LONGSPAN_PYTHON": str(python)}
    command = ["bash", str(script), "--nproc", "2", *words]
    return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def torchrun(mark: str, *words: str) -> subprocess.Popen[bytes]:
    """tools.torchrun in torchrun's place."""
    with open(f"{mark}.txt", "ab") as out:
        command = [sys.executable, "-m", "tools.torchrun", *words]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | QUIET, stdout=out, stderr=out)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_launcher_saves_and_the_same_command_resumes(
    number: signal.Signals, code: int, mark: str, tmp_path: Path
) -> None:
    path, run = write_run(tmp_path, "mark"), tmp_path / "mark"
    settings = ("save.every=0", f"save.signal_exit_code={code}")
    job = launch(mark, path, "train.steps=5000", *settings, script=number == signal.SIGTERM)
    wait_for_step(run, 3)
    job.send_signal(number)
    time.sleep(0.3)
    job.send_signal(number)  # a second one, while it saves or leaves, changes nothing
    ended = finish(mark, [job])
    assert ended.codes == [code], ended.text
    done = len(losses(run))
    choice = choose(run / "checkpoints")
    assert choice is not None and choice.step == done
    assert f"{number.name}: stopped and saved at step {done}; rerun the same command" in ended.text
    assert "Traceback" not in ended.text and "launcher:" not in ended.text
    ended = finish(mark, [launch(mark, path, f"train.steps={done + 1}", *settings)])
    assert ended.codes == [0] and f"resumed at step {done} from" in ended.text, ended.text
    assert len(losses(run)) == done + 1


@pytest.mark.timeout(400)
def test_a_signal_to_one_of_two_machines_saves_on_both(mark: str, tmp_path: Path) -> None:
    path, run = write_run(tmp_path, "mark"), tmp_path / "mark"
    settings = ("--set", "train.steps=5000", "--set", "save.every=0", "--set", "save.signal_exit_code=75")
    with reserved_port() as port:
        meet = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank")
        jobs = [torchrun(mark, *meet, rank, "-m", "pipeline.train", "--config", str(path), *settings) for rank in "01"]
    wait_for_step(run, 3)
    jobs[1].send_signal(signal.SIGUSR1)
    ended = finish(mark, jobs)
    assert ended.codes == [75, 75], ended.text
    choice = choose(run / "checkpoints")
    assert choice is not None and choice.step == len(losses(run))


@pytest.mark.timeout(400)
def test_ctrl_c_saves_and_a_second_one_ends_the_launch_script_at_once(mark: str, tmp_path: Path) -> None:
    path, run = write_run(tmp_path, "mark"), tmp_path / "mark"
    settings = ("train.steps=5000", "save.every=0", "save.signal_exit_code=75")
    job = launch(mark, path, *settings)
    wait_for_step(run, 3)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to the foreground's processes
    ended = finish(mark, [job])
    assert ended.codes == [130] and "Traceback" not in ended.text, ended.text
    done = len(losses(run))
    choice = choose(run / "checkpoints")
    assert choice is not None and choice.step == done
    assert f"Ctrl-C: stopped and saved at step {done}; rerun the same command to go on" in ended.text
    assert ended.text.count("once more ends it at once") == 1

    job = launch(mark, path, *settings, script=True)
    wait_for_step(run, done + 2)
    ranks = psutil.Process(job.pid).children()
    ranks[0].suspend()  # nobody reaches a boundary any more
    os.killpg(job.pid, signal.SIGINT)
    began = time.monotonic()
    while "once more ends it at once" not in Path(f"{mark}.txt").read_text():
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    began = time.monotonic()
    ended = finish(mark, [job], 20)
    assert ended.codes == [130] and time.monotonic() - began < 5, ended.text
    assert ended.text.splitlines()[-1].startswith("Ctrl-C twice: ended at once") and "Traceback" not in ended.text
    assert choose(run / "checkpoints") == choice


@pytest.mark.timeout(400)
def test_ctrl_c_to_one_process_saves_and_to_two_without_a_launcher_ends_twice(mark: str, tmp_path: Path) -> None:
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    settings = [word for one in ("train.steps=5000", "save.every=0") for word in ("--set", one)]
    with open(f"{mark}.txt", "wb") as out:
        command = [sys.executable, "-m", "pipeline.train", "--config", str(path), *settings]
        job = subprocess.Popen(command, cwd=ROOT, env=os.environ | QUIET, stdout=out, stderr=out)
    wait_for_step(run, 2)
    job.send_signal(signal.SIGINT)
    ended = finish(mark, [job])
    done = len(losses(run))
    assert ended.codes == [130] and f"Ctrl-C: stopped and saved at step {done}; rerun" in ended.text, ended.text
    choice = choose(run / "checkpoints")
    assert choice is not None and choice.step == done and not (run / ".lock").exists()
    assert "Traceback" not in ended.text and "stopping at the next boundary" in ended.text

    ranks = start(mark, "none", 0, 0, "--config", path, *settings, torchrun=False)
    wait_for_step(run, done + 2)
    ranks[1].send_signal(signal.SIGSTOP)  # rank 0 stands in a collective, where Python runs no handler
    time.sleep(1)
    for _ in range(2):
        ranks[0].send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert ranks[0].wait(10) == 130
    ranks[1].kill()
    assert "Traceback" not in finish(mark, ranks).text


def test_a_signal_with_nothing_to_save_ends_it_at_once(mark: str, tmp_path: Path) -> None:
    """Its processes are still starting, or wait for another machine."""
    job = launch(mark, write_run(tmp_path, "mark"), "train.steps=5000", script=True)
    until = time.monotonic() + 60
    launcher = psutil.Process(job.pid)
    while "tools.launch" not in " ".join(launcher.cmdline()) or not launcher.children():
        assert time.monotonic() < until
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    ended = finish(mark, [job], 30)
    assert ended.codes == [128 + signal.SIGUSR1], ended.text
    assert ended.text.splitlines()[-1].startswith("launcher: SIGUSR1 came before the first step")

    meet = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "9")
    job = torchrun(mark, *meet, "-m", "pipeline.train", "--config", mark)
    while not re.search(r"SigCgt:\s+\w*[2367abef]\w\w$", Path(f"/proc/{job.pid}/status").read_text(), re.MULTILINE):
        assert time.monotonic() < until  # SIGUSR1 is bit 9
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    ended = finish(mark, [job], 10)
    assert ended.codes == [128 + signal.SIGUSR1]
    assert ended.text.splitlines()[-1] == "launcher: SIGUSR1: no process is at work, nothing is to be saved."


def test_what_a_rank_says_of_its_failure_comes_last(mark: str, tmp_path: Path) -> None:
    ended = finish(mark, [launch(mark, write_run(tmp_path, "mark"), "train.xyzzy=1", script=True)])
    assert ended.codes == [2] and "train.xyzzy: unknown key" in ended.text.splitlines()[-1], ended.text
    assert "Traceback" not in ended.text

    fault = ("--standalone", "--nproc-per-node", "2", "-m", "tests.integration.faulty")
    ended = finish(mark, [torchrun(mark, *fault, "bug", "1", "2", "60", mark)])
    lines = ended.text.splitlines()
    assert ended.codes == [1] and lines[-1] == "launcher: rank 1 left with code 1; what it said of it is above."
    assert lines[-2].startswith("error: rank 1 failed at step 2: ") and ended.text.count("Traceback") == 1
    ended = finish(mark, [torchrun(mark, *fault, "kill", "1", "2", "60", mark)])
    lines = ended.text.splitlines()
    assert ended.codes == [128 + signal.SIGKILL] and re.fullmatch(r"launcher: rank 1 .* ended by SIGKILL\.", lines[-1])
    assert lines[-2].startswith("error: rank 1 died at step 2 ")


def test_the_exit_code_goes_through_the_launchers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "exit"
    assert exit_code(75, RankEnv.read()) == 75, "one process alone"
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", EXIT_FILE: str(file)}.items():
        monkeypatch.setenv(name, value)
    assert exit_code(75, RankEnv.read()) == 0 and not file.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code(75, RankEnv.read()) == 0 and file.read_text() == "75"
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "gone/exit"))
    assert exit_code(75, RankEnv.read()) == 75, "what was saved is saved"


@pytest.mark.timeout(600)
def test_sigkill_at_random_instants(mark: str, tmp_path: Path) -> None:
    """Two ranks that save every step are killed again and again; what they end with is what an undisturbed run has."""
    straight, path, run = write_run(tmp_path, "straight"), write_run(tmp_path, "run"), tmp_path / "run"
    overrides = [f"train.steps={STEPS}", "save.every=1", "parallel.cp=2"]
    words = [word for override in overrides for word in ("--set", override)]
    instants = random.Random(0)
    # When a step's row is there, the save of the step before it was begun, and so the one before that was finished.
    for done, victim in ((3, 0), (7, 1)):
        ranks = start(mark, "none", 0, 0, "--config", path, *words, torchrun=False)
        wait_for_step(run, done)
        time.sleep(instants.random() * 0.3)
        ranks[victim].kill()
        finish(mark, ranks)
        choice = choose(run / "checkpoints")
        assert choice is not None and choice.step >= done - 2
    ended = finish(mark, start(mark, "none", 0, 0, "--config", path, *words, torchrun=False))
    assert ended.codes == [0, 0], ended.text
    assert ended.text.count("resumed at step ") == 2 and "was left by process" in ended.text
    undisturbed = finish(mark, start(mark, "none", 0, 0, "--config", straight, *words, torchrun=False))
    assert undisturbed.codes == [0, 0]
    assert losses(run) == losses(tmp_path / "straight") and len(losses(run)) == STEPS


def test_two_jobs_on_one_output(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run")
    with OutputLock(tmp_path / "run"), pytest.raises(ConfigError, match="in use by another job"):
        run_here(path)
