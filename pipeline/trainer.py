"""The step loop, and nothing else: what it works with is composed in `build`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parallel.collectives import sum_buckets, sum_over
from parallel.groups import Groups
from parallel.rng import rng_state
from pipeline.checkpoint import CheckpointStore
from pipeline.data.loader import Batch, TrainLoader
from pipeline.guard import NonFiniteGuard
from pipeline.metrics import MetricsWriter, peak_memory_gib
from pipeline.model.attention_layout import AttentionSpec, SequenceLayout
from pipeline.model.loss import IGNORE
from pipeline.model.stage import LlamaStage
from pipeline.optim import TrainableAdamW
from pipeline.progress import TrainProgress
from pipeline.schedule import learning_rate
from pipeline.schema import RunConfig


@dataclass(frozen=True)
class TrainerParts:
    """Everything a trainer works with."""

    config: RunConfig
    groups: Groups
    stage: LlamaStage
    optimizer: TrainableAdamW
    loader: TrainLoader
    guard: NonFiniteGuard
    store: CheckpointStore
    spec: AttentionSpec
    """Training attention."""
    full_spec: AttentionSpec
    """Full attention, for the last `attention.full_last_steps` steps."""
    manifest: dict[str, Any]
    """What every checkpoint records of the run: config, base hash, data fingerprint."""


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
    ) -> None:
        """Train to the last step, saving as configured.

        Args:
            metrics: rank 0's writer, None elsewhere.
            progress: the live display.
            on_step: called after each optimizer step with the number of steps done (periodic evaluation).
            stop_after: stop, saved, once so many steps are done; None: the configured end.

        Raises:
            TrainingDiverged: too many non-finite steps in a row.
            CheckpointError: a checkpoint could not be written.
        """
        config = self.parts.config
        end = min(config.train.steps, stop_after or config.train.steps)
        while self.step < end:
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
                self.save()
            on_step(self.step)

    def save(self) -> None:
        """Write a checkpoint of the current step; collective."""
        parts = self.parts
        state = parts.optimizer.state_dict()
        parts.store.save(
            self.step,
            parts.optimizer.masters(),
            state,
            rng_state(),
            {**parts.manifest, "guard": parts.guard.state_dict()},
        )

    def _spec(self, step: int) -> AttentionSpec:
        config = self.parts.config
        full = step >= config.train.steps - config.attention.full_last_steps
        return self.parts.full_spec if full else self.parts.spec

    def _one_step(self, step: int) -> dict[str, Any]:
        """Forward, backward, reduce, clip, update; returns loss, norm, rates and token count."""
        parts, train = self.parts, self.parts.config.train
        data = parts.groups.data
        batches = parts.loader.step(step)
        # The loss is a mean over all scored tokens of the step, wherever they sit: the count is known before the first
        # forward, so that gradients need no correction and equal those of one process with one big batch.
        counts = torch.tensor(
            [sum(int((b.labels != IGNORE).sum()) for b in batches), sum(b.tokens.numel() for b in batches)],
            dtype=torch.int64,
            device=parts.groups.device,
        )
        scored, tokens = (int(n) for n in sum_over(data, counts))
        parts.stage.train()
        parts.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=parts.groups.device)
        for batch in batches:
            loss = self._loss(batch, self._spec(step))
            total += loss.detach().double()
            (loss / max(scored, 1)).backward()
        sum_buckets(data, parts.optimizer.flat_gradients())
        mean_loss = float(sum_over(data, total)) / max(scored, 1)
        norm = float(parts.optimizer.grad_norm())
        rates = {
            "lora": self._rate(step, train.lr),
            "other": self._rate(step, train.lr_embed_norm or train.lr),
        }
        if parts.guard.check(mean_loss, norm):
            parts.optimizer.step(rates, norm)
        return {
            "loss": mean_loss,
            "grad_norm": norm,
            "lr": rates["lora"],
            "tokens": tokens,
            "skipped": parts.guard.skipped,
        }

    def _rate(self, step: int, peak: float) -> float:
        train = self.parts.config.train
        return learning_rate(step, peak, train.warmup_steps, train.steps, train.schedule, train.min_lr_ratio)

    def _loss(self, batch: Batch, spec: AttentionSpec) -> torch.Tensor:
        device = self.parts.groups.device
        documents = None if batch.document_ids is None else batch.document_ids.numpy()
        rows, sequence = batch.tokens.shape
        layout = SequenceLayout.build(rows, sequence, document_ids_BS=documents)
        tokens = batch.tokens.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        return self.parts.stage.loss_sum(tokens, labels, layout, spec)
