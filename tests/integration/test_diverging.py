"""The non-finite guard inside the trainer: a bad step changes nothing and is counted; too many stop the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.world.rank_env import RankEnv
from pipeline.build import build
from pipeline.config.yaml_file import load_config
from pipeline.reporting.progress import TrainProgress
from pipeline.training.non_finite import TrainingDiverged
from pipeline.training.state import whole_state
from tests.numerics.test_training import write_run


def test_a_nan_loss_skips_the_step_and_too_many_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(load_config(write_run(tmp_path, "run"), ["train.bad_steps=2", "save.every=1"]), RankEnv())
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
        with pytest.raises(TrainingDiverged, match=r"stopped at step 5: loss nan .* 2 non-finite steps .*\(3 skipped"):
            trainer.run(None, progress)
        assert same(states[4], state())
        assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-000004"
    finally:
        parts.loader.close()
