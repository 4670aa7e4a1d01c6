"""The step loop, and nothing else: what it works with is composed in `build`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parallel.checks import RunChecks
from parallel.collectives import sum_over
from parallel.groups import Groups
from parallel.process import Watch
from parallel.rng import rng_state
from pipeline.checkpoint import CheckpointStore
from pipeline.data.loader import TrainLoader
from pipeline.guard import NonFiniteGuard
from pipeline.metrics import MetricsWriter, peak_memory_gib
from pipeline.model.attention_layout import AttentionSpec
from pipeline.model.loss import IGNORE
from pipeline.model.part import ModelPart
from pipeline.optim import TrainableAdamW
from pipeline.progress import TrainProgress
from pipeline.reduction import GradientReduction
from pipeline.schedule import learning_rate
from pipeline.schema import RunConfig
from pipeline.state import whole_state


@dataclass(frozen=True)
class TrainerParts:
    """Everything a trainer works with."""

    config: RunConfig
    groups: Groups
    model: ModelPart
    optimizer: TrainableAdamW
    reduction: GradientReduction
    loader: TrainLoader
    guard: NonFiniteGuard
    store: CheckpointStore
    spec: AttentionSpec
    """Training attention."""
    full_spec: AttentionSpec
    """Full attention, for the last `attention.full_last_steps` steps."""
    manifest: dict[str, Any]
    """What every checkpoint records of the run: config, base hash, data fingerprint."""
    checks: RunChecks | None = None
    """Run-time invariants; None: `checks` is off."""


class Trainer:
    """Runs optimizer steps from `start` to the configured end."""

    def __init__(self, parts: TrainerParts, start: int) -> None:
        self.parts, self.step = parts, start

    def run(
        self,
        metrics: MetricsWriter | None,
        progress: TrainProgress,
        on_step: Callable[[int], None] = lambda step: None,
        stop_after: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Train to the last step, saving as configured.

        Args:
            metrics: rank 0's writer, None elsewhere.
            progress: the live display.
            on_step: called after each optimizer step with the number of steps done (periodic evaluation).
            stop_after: stop, saved, once so many steps are done; None: the configured end.
            watch: learns of every step begun, so that a rank that stands still is noticed.

        Raises:
            TrainingDiverged: too many non-finite steps in a row.
            CheckpointError: a checkpoint could not be written.
        """
        config = self.parts.config
        end = min(config.train.steps, stop_after or config.train.steps)
        watch = watch or Watch()
        while self.step < end:
            watch.progress(self.step + 1)
            began = time.perf_counter()
            row = self._one_step(self.step)
            self.step += 1
            seconds = time.perf_counter() - began
            row |= {
                "step": self.step,
                "seconds": seconds,
                "tokens_per_second": row["tokens"] / seconds,
                "memory_gib": peak_memory_gib(),
            }
            if metrics is not None:
                metrics.write(row)
            progress.update(self.step, row)
            if self.step == end or (config.save.every and self.step % config.save.every == 0):
                with watch.patient("saving"):
                    self.save()
            on_step(self.step)

    def save(self) -> None:
        """Write a checkpoint of the current step; collective."""
        parts = self.parts
        if parts.checks is not None:
            parts.checks.before_save(self.step)
        trained, optimizer = whole_state(parts.model, parts.config.train.trainable, parts.optimizer)
        parts.store.save(
            self.step,
            trained,
            optimizer,
            rng_state(),
            {**parts.manifest, "guard": parts.guard.state_dict()},
        )

    def _spec(self, step: int) -> AttentionSpec:
        config = self.parts.config
        full = step >= config.train.steps - config.attention.full_last_steps
        return self.parts.full_spec if full else self.parts.spec

    def _one_step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns loss, norm, rates and token count."""
        row = self.gradients(step)
        self.update(step, row)
        return row

    def gradients(self, step: int) -> dict[str, Any]:
        """Forward and backward of optimizer step `step`, gradients summed over ranks into `main_grad`; collective.

        Returns:
            loss (mean over scored tokens, nats), grad_norm, tokens; alike on every rank.
        """
        parts, groups = self.parts, self.parts.groups
        batches = parts.loader.step(step)
        # The loss is a mean over all scored tokens of the step, wherever they sit: the count is known before the first
        # forward, so that gradients need no correction and equal those of one process with one big batch.
        counts = torch.tensor(
            [sum(int((b.labels != IGNORE).sum()) for b in batches), sum(b.tokens.numel() for b in batches)],
            dtype=torch.int64,
            device=groups.device,
        )
        scored, tokens = (int(n) for n in sum_over(groups.replicas, counts))
        parts.model.train()
        parts.optimizer.zero_grad()
        total = parts.model.train_step(
            batches, self._spec(step), 1 / max(scored, 1), before_last_backward=parts.optimizer.arm_reduce
        )
        parts.reduction.finish(parts.optimizer)
        return {
            "loss": float(parts.reduction.total(total)) / max(scored, 1),
            "grad_norm": float(parts.optimizer.grad_norm(parts.reduction.squares)),
            "tokens": tokens,
        }

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Clip and apply the gradients unless `row`'s figures are not finite; adds rates and skips to `row`."""
        parts, train = self.parts, self.parts.config.train
        rates = {
            "lora": self._rate(step, train.lr),
            "other": self._rate(step, train.lr_embed_norm or train.lr),
        }
        if parts.guard.check(row["loss"], row["grad_norm"]):
            parts.optimizer.step(rates, row["grad_norm"])
        if parts.checks is not None:
            parts.checks.after_step(step + 1)
        row |= {"lr": rates["lora"], "skipped": parts.guard.skipped}

    def _rate(self, step: int, peak: float) -> float:
        train = self.parts.config.train
        return learning_rate(step, peak, train.warmup_steps, train.steps, train.schedule, train.min_lr_ratio)
