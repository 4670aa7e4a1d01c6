"""Trains one run of a study: by the product's trainer, or every weight in transformers' model; or only loads it."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from parallel.health.signals import StopSignals
from parallel.world.rank_env import RankEnv
from pipeline.build import build, build_model, connect, open_base
from pipeline.checkpoint.choose import newest
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.run import RunConfig
from pipeline.config.sections import LoraConfig
from pipeline.data.shards import TokenShards
from pipeline.export.part_way import PartWay
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import load_trained
from pipeline.planning.run_plan import plan_run
from pipeline.reporting.metrics import peak_memory_gib
from pipeline.reporting.progress import TrainProgress
from pipeline.storage.durable import replace_text
from pipeline.training.trainer import Stopped
from tools.study.whole_model import train_whole


class OutOfTime(Exception):
    """The time the user gave is over; what was done is kept."""


class Recorder(TrainProgress):
    """Shows training and keeps what a study records of it."""

    def __init__(self, total: int, start: int) -> None:
        super().__init__(total, start, every=50)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        """Of each step."""
        self.tokens = 0

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().update(step, metrics)
        self.losses.append(metrics["loss"])
        self.seconds.append(metrics["seconds"])
        self.tokens += metrics["tokens"]


class Training:
    """What trains and loads models within the time there is.

    Args:
        env: of the one process.
        signals: that end training, saved.
        left: seconds left.
    """

    def __init__(self, env: RankEnv, signals: StopSignals, left: Callable[[], float]) -> None:
        self.env, self.signals, self.left = env, signals, left

    def heed(self) -> None:
        """Between windows and steps.

        Raises:
            Stopped, OutOfTime: it is time to leave.
        """
        if self.signals.number:
            raise Stopped(self.signals.number)
        if self.left() <= 0:
            raise OutOfTime("the time given is over")

    @contextlib.contextmanager
    def untrained(self, config: RunConfig) -> Iterator[RankModel]:
        """The base with the run's RoPE."""
        plan = plan_run(config, self.env.world_size)
        base = open_base(config, plan.arch)
        groups = connect(plan, self.env)
        model = build_model(plan, LoraConfig(rank=0), groups, base)
        model.requires_grad_(False)
        try:
            yield model
        finally:
            model.close()

    def whole(self, config: RunConfig, shards: TokenShards, folder: Path) -> tuple[dict[str, Any], Recorder]:
        """Train every weight into a Hugging Face folder; a run that is left begins anew."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with Recorder(config.train.steps, 0) as progress:

            def on_step(step: int, loss: float, took: float, tokens: int) -> None:
                row = {"loss": loss, "seconds": took, "tokens": tokens, "tokens_per_second": tokens / took}
                progress.update(step, {**row, "memory_gib": peak_memory_gib(), "skipped": 0})
                self.heed()

            train_whole(plan_run(config, self.env.world_size), shards, folder, device, on_step)
        return training_facts(len(progress.losses), progress, 0, folder), progress

    @contextlib.contextmanager
    def trained(self, config: RunConfig, strength: float = 1.0) -> Iterator[tuple[RankModel, dict[str, Any], Recorder]]:
        """The model after training, which goes on from what an earlier process saved.

        Args:
            strength: of the way from the base's weights to the trained ones.
        """
        plan = plan_run(config, self.env.world_size)
        run = build(plan, self.env)
        parts, trainer = run.trainer.parts, run.trainer
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(parts.model.close)
            cleanup.callback(parts.loader.close)
            cleanup.callback(parts.saver.close)
            progress = Recorder(config.train.steps, trainer.step)
            start = trainer.step

            def on_step(step: int) -> None:
                if self.left() <= 0 and step < config.train.steps:
                    raise Stopped(signal.SIGALRM)

            with progress, trainer.listening(self.signals):
                stopped = trainer.run(None, progress, on_step)
            training = training_facts(config.train.steps, progress, start, Path(config.output))
            if stopped == signal.SIGALRM:
                raise OutOfTime(f"the time given is over; step {trainer.step} of {config.train.steps} is saved")
            if stopped:
                raise Stopped(stopped)
            if strength != 1:
                saved = newest(Path(config.output) / "checkpoints")
                assert saved is not None, "a run that ends is saved"
                base = open_base(config, plan.arch)
                load_trained(parts.model, PartWay(whole_trained(saved), base, plan.arch.vocab, strength))
            yield parts.model, training, progress


def training_facts(steps: int, progress: Recorder, start: int, folder: Path) -> dict[str, Any]:
    """What training was, across the processes that took part: steps, tokens, seconds, loss, peak GiB."""
    path = folder / "training.json"
    parts: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if progress.losses:
        tail = progress.losses[-max(1, len(progress.losses) // 10) :]
        parts = [part for part in parts if part["start"] < start]
        parts.append(
            {
                "start": start,
                "seconds": sum(progress.seconds),
                "tokens": progress.tokens,
                "loss": sum(tail) / len(tail),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            }
        )
        replace_text(path, json.dumps(parts) + "\n")
    # Not this process's: it may only have loaded what an earlier one trained.
    peaks = [part["peak_gib"] for part in parts if part.get("peak_gib") is not None]
    return {
        "steps": steps,
        "seconds": sum(part["seconds"] for part in parts),
        "tokens": sum(part["tokens"] for part in parts),
        "loss": parts[-1]["loss"] if parts else None,
        "peak_gib": max(peaks, default=None),
    }
