"""Signals, and SIGKILL at random instants, on real ranks: saved at one step, resumed to the bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from pipeline.checkpoint.choose import choose
from pipeline.lock import OutputLock
from tests.integration.test_faults import finish, mark, start
from tests.numerics.test_training import losses, run_here, write_run

__all__ = ["mark"]
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
    assert f"{number.name}: stopped and saved at step {done}; the same command goes on" in ended.text
    assert not (run / ".lock").exists()


@pytest.mark.timeout(600)
def test_sigkill_at_random_instants(mark: str, tmp_path: Path) -> None:
    """Two ranks that save every step are killed again and again; what they end with is what an undisturbed run has."""
    straight, path, run = write_run(tmp_path, "straight"), write_run(tmp_path, "run"), tmp_path / "run"
    overrides = [f"train.steps={STEPS}", "save.every=1", "parallel.cp=2"]
    words = [word for override in overrides for word in ("--set", override)]
    instants = random.Random(0)
    for done, victim in ((2, 0), (6, 1)):
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
