"""A process of a run from its first line to its exit: signals amid evaluations, what it tells, what a rerun makes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import CheckpointError, ConfigError
from parallel.health.watch import Watch
from parallel.world.rank_env import RankEnv
from pipeline.build import connect, open_tokens
from pipeline.checkpoint.choose import choose
from pipeline.checkpoint.compatibility import check_output
from pipeline.config.yaml_file import load_config
from pipeline.data import prepare
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.rank_model import RankModel
from pipeline.planning.run_plan import plan_run
from pipeline.reporting.progress import EvalProgress
from pipeline.train import main
from tests.numerics.test_training import losses, run_here, write_run

EXIT = 75


def command(folder: Path, output: str = "run") -> list[str]:
    path, text = write_run(folder, output), folder / "held-out.txt"
    text.write_text(" ".join(f"w{n % 25}{'abc'[n % 7 % 3]}" for n in range(800)))
    words = ["--config", str(path)]
    for setting in (f"eval.path={text}", "eval.windows=3", "eval.every=2", f"save.signal_exit_code={EXIT}"):
        words += ["--set", setting]
    return words


def signal_in(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM after the first window of that evaluation, once."""
    inner, left = EvalProgress.advance, [1]

    def advance(progress: EvalProgress) -> None:
        inner(progress)
        if label in progress.label and left:
            left.pop()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(EvalProgress, "advance", advance)


def test_a_signal_amid_the_first_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, run = command(tmp_path), tmp_path / "run"
    signal_in("untrained", monkeypatch)
    assert main(words) == EXIT
    assert "SIGTERM: stopped in an evaluation" in capsys.readouterr().out
    assert choose(run / "checkpoints") is None and not (run / "eval-untrained.json").exists()
    assert not (run / ".lock").exists() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert main(words) == 0
    assert (run / "eval-untrained.json").exists() and (run / "eval-after.json").exists()


def test_a_signal_amid_a_later_evaluation_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, run = command(tmp_path), tmp_path / "run"
    signal_in("step-000002", monkeypatch)
    assert main(words) == EXIT
    assert "SIGTERM: stopped and saved at step 2" in capsys.readouterr().out
    choice = choose(run / "checkpoints")
    assert choice is not None and choice.step == 2
    assert not (run / "eval-step-000002.json").exists()
    assert main(words) == 0
    assert (run / "eval-step-000002.json").exists(), "the one that was cut off is made up"
    run_here(write_run(tmp_path, "straight"))
    assert losses(run) == losses(tmp_path / "straight")


def test_a_signal_amid_the_last_evaluation_which_a_rerun_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, after = command(tmp_path), tmp_path / "run/eval-after.json"
    signal_in("after", monkeypatch)
    assert main(words) == EXIT and not after.exists()
    assert main(words) == 0
    assert "nothing left to train: 6 steps of 6 are done" in capsys.readouterr().out
    assert json.loads(after.read_text())["step"] == 6
    # A third time there is nothing to evaluate either.
    monkeypatch.setattr("pipeline.evaluation.evaluator.evaluate", None)
    assert main(words) == 0
    after.write_text("{")
    with pytest.raises(TypeError, match="not callable"):  # what was cut off is made again
        main(words)


def test_another_models_evaluations_are_forgotten(tmp_path: Path) -> None:
    words, run = command(tmp_path), tmp_path / "run"
    assert main(words) == 0
    before = {name: (run / f"eval-{name}.json").read_text() for name in ("after", "step-000004")}
    shutil.rmtree(run / "checkpoints")
    assert main([*words, "--set", "train.lr=5.0e-2", "--stop-after", "2"]) == 0
    assert not any((run / f"eval-{name}.json").exists() for name in before)
    assert main([*words, "--set", "train.lr=5.0e-2"]) == 0
    assert all((run / f"eval-{name}.json").read_text() != text for name, text in before.items())


def test_what_a_run_says_of_itself_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    assert main(["--config", str(path), "--stop-after", "2"]) == 0
    told = capsys.readouterr().out
    assert "6 steps of 4 windows of 64 tokens; the data hold 430, each read 0.056 times" in told
    assert "s2 attention in groups of 16" in told
    assert "RoPE linear x 2, base 100,000;" in told and "train; engine megatron, tp 1 cp 1 pp 1 dp 1" in told
    facts = json.loads((run / "run.json").read_text())
    assert [session["to_step"] for session in facts["sessions"]] == [2] and facts["parameters"]["lora"] > 0
    # Another device's generators have other states, which a resume must not be given.
    manifest = json.loads((run / "checkpoints/step-000002/manifest.json").read_text())
    assert manifest["layout"]["device"] == "cpu"
    (run / "run.json").write_text("{")
    assert main(["--config", str(path), "--stop-after", "2"]) == 0
    assert "nothing left to train: 2 steps of 6 are done, and --stop-after says 2\n" in capsys.readouterr().out
    assert (run / "run.json.damaged").read_text() == "{"
    assert json.loads((run / "run.json").read_text())["step"] == 2
    with pytest.raises(ConfigError, match=r"^train\.steps: 1 is less than the 2 steps done in .*; raise it, or choose"):
        run_here(path, ["train.steps=1"])
    with pytest.raises(ConfigError, match=r"^train\.steps: 1 is less than the 2"):  # the preflight's look, too
        check_output(load_config(path, ["train.steps=1"]))


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_stopping_after_no_step_is_refused(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--config", "any.yaml", "--stop-after", steps])
    said = f"--stop-after: must be a whole number, 1 or more, got '{steps}'"
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_tokenizing_for_hours_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Watch):
        touched = 0

        def touch(self) -> None:
            self.touched += 1

    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 10)
    config = load_config(write_run(tmp_path, "run"), [])
    groups, watch = connect(plan_run(config, 1), RankEnv()), Counting()
    tokenizer = load_tokenizer(Path(config.model.path))
    open_tokens(config, config.data.path, tokenizer, groups, watch)
    assert watch.touched >= 2 * 3, "every source file, hashed and tokenized"
    before = watch.touched
    open_tokens(config, config.data.path, tokenizer, groups, watch)
    assert watch.touched == before, "prepared already"


def test_a_folder_that_another_job_took_over_gets_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    honest = RankModel.train_step

    def taken(self: RankModel, *args: Any, **more: Any) -> Any:
        (run / ".lock").write_text("{}")
        return honest(self, *args, **more)

    monkeypatch.setattr(RankModel, "train_step", taken)
    with pytest.raises(CheckpointError, match=r"could not be written \(.*\.lock: is no longer this job's"):
        run_here(path, stop_after=1)
    assert choose(run / "checkpoints") is None
