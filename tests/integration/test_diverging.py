"""Divergence inside the trainer: a step that is not finite changes nothing; too many, or a loss too high, stop it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.reporting.progress import TrainProgress
from pipeline.train import main
from pipeline.training.non_finite import TrainingDiverged
from pipeline.training.state import whole_state
from tests.numerics.test_training import final, losses, write_run
from tests.support.runs import build_run


def test_a_nan_loss_skips_the_step_and_too_many_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(load_config(write_run(tmp_path, "run"), ["train.bad_steps=2", "save.every=1"]), RankEnv())
    trainer, parts = run.trainer, run.trainer.parts
    original, bad = parts.model.train_step, {1, 3, 4}

    def train_step(*args: Any, **kwargs: Any) -> Any:
        total = original(*args, **kwargs)
        return total * float("nan") if trainer.step in bad else total

    def state() -> dict[str, torch.Tensor]:
        trained, optimizer = whole_state(parts.model, parts.config.train.trainable, parts.optimizer)
        copies = {f"model {name}": tensor.clone() for name, tensor in trained.items()}
        return copies | {f"optimizer {name}": tensor.clone() for name, tensor in optimizer.items()}

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    monkeypatch.setattr(parts.model, "train_step", train_step)
    states, progress = [state()], TrainProgress(6, enabled=False)
    try:
        for step in (1, 2, 3, 4):
            trainer.run(None, progress, stop_after=step)
            states.append(state())
        assert not same(states[0], states[1])
        assert same(states[1], states[2]), "a bad step must leave weights, moments and their step count alone"
        assert not same(states[2], states[3]) and same(states[3], states[4])
        assert (parts.guard.skipped, parts.guard.consecutive, trainer.step) == (2, 1, 4)
        with pytest.raises(
            TrainingDiverged, match=r"stopped at step 5: loss nan .* 2 non-finite .*\(3 skipped"
        ) as told:
            trainer.run(None, progress)
        assert same(states[4], state())
        # Step 4 was saved after the first of the two bad steps that stopped the run, which had the weights of step 3.
        assert "renamed: diverged-step-000004, diverged-step-000003" in str(told.value)
        assert "goes on from step 2" in str(told.value)
        folder = tmp_path / "run/checkpoints"
        assert (folder / "latest").read_text().strip() == "step-000002"
        assert (folder / "diverged-step-000004").is_dir() and not (folder / "step-000004").exists()
    finally:
        parts.loader.close()


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ("3.0e+1", "the run's first step lost, and 2 steps in a row were so or not finite: it has diverged; lower"),
        ("2.0e+5", "2 non-finite steps in a row"),
    ],
)
def test_divergence_is_told_and_ends_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: str, said: str
) -> None:
    """A rate far too high: nothing need be NaN for the loss to say it all."""
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    words = ["--config", str(path), "--set", "save.every=1", "--set", "train.bad_steps=2"]
    assert main([*words, "--stop-after", "2"]) == 0
    wild = [
        *words,
        "--set",
        f"train.lr={rate}",
        "--set",
        "train.clip=0",
        "--set",
        "resume.allow=[train.lr, train.clip]",
    ]
    capsys.readouterr()
    assert main(wild) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    # Step 3 is the first at that rate and the loss of step 4 the first of its weights.
    assert told.startswith("error: Training stopped at step 5: loss ") and said in told
    assert "Checkpoints in doubt were renamed: diverged-step-000003" in told
    assert "A rerun goes on from step 2; with resume.allow: [train.lr]" in told
    folder = run / "checkpoints"
    assert (folder / "latest").read_text().strip() == "step-000002"
    assert not any((folder / f"step-00000{step}").exists() for step in (3, 4, 5))
    assert all(bool(tensor.isfinite().all()) for tensor in final(run).values())
    # What the sentence advises is taken.
    mended = ["--set", "train.lr=1.0e-3", "--set", "resume.allow=[train.lr]"]
    assert main([*words, *mended]) == 0
    assert "resume: train.lr was 0.005 and is 0.001 from step 2 on" in capsys.readouterr().out
    assert len(losses(run)) == 6 and losses(run)[-1] < losses(run)[0]


def test_weights_ruined_by_the_last_step_are_found_by_their_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = write_run(tmp_path, "run"), tmp_path / "held-out.txt"
    text.write_text(" ".join(f"v{n * n % 997}" for n in range(900)))
    words = ["--config", str(path), "--set", f"eval.path={text}", "--set", "eval.windows=1", "--set", "train.steps=1"]
    assert main([*words, "--set", "train.lr=2.0e+5", "--set", "train.warmup_steps=0"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: The weights of step 1 lose 64: ") and "training has diverged" in told
    assert "No earlier checkpoint is left, so a rerun starts over, and any setting may change." in told
    assert main(words) == 0, "and so it does"
    assert "the run ends at 50% of train.lr" in capsys.readouterr().out
