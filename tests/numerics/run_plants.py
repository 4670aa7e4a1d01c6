"""Faults in how a run is composed, for `test_run_oracle` to find: each a context manager that plants one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import megatron.core.tensor_parallel.random as megatron_random
import torch

from pipeline import build
from pipeline.config.sections import AttentionConfig
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.packing import IGNORE
from pipeline.evaluation import evaluator
from pipeline.evaluation.evaluator import Evaluator
from pipeline.model.rank_model import RankModel
from pipeline.planning.run_plan import RunPlan
from pipeline.training import trainer
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.trainer import Trainer

Plant = Callable[[], contextlib.AbstractContextManager[Any]]


def _without(setting: str) -> Plant:
    """A setting of the optimizer that is not handed over: its default is used."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        def made(*args: Any, **kwargs: Any) -> TrainableAdamW:
            del kwargs[setting]
            return TrainableAdamW(*args, **kwargs)

        with mock.patch.object(build, "TrainableAdamW", made):
            yield

    return plant


def one_rate() -> Any:
    """Embedding and norms learn at the adapters' rate."""
    honest = TrainableAdamW.step

    def step(self: TrainableAdamW, rates: Any, norm: float) -> None:
        honest(self, dict.fromkeys(rates, rates["lora"]), norm)

    return mock.patch.object(TrainableAdamW, "step", step)


def _schedule(**other: Any) -> Plant:
    honest = trainer.learning_rate

    def rate(step: int, peak: float, warmup: int, total: int, schedule: str, low: float) -> float:
        given = {"warmup_steps": warmup, "schedule": schedule, "total_steps": total}
        for name, value in other.items():
            given[name] = given[name] + value if isinstance(value, int) else value
        return honest(step, peak, min_lr_ratio=low, **given)

    return lambda: mock.patch.object(trainer, "learning_rate", rate)


def _train_step(change: Callable[..., torch.Tensor]) -> Plant:
    honest = RankModel.train_step

    def step(self: RankModel, batches: Sequence[Batch], spec: Any, scale: float, **hooks: Any) -> torch.Tensor:
        return change(lambda some, factor: honest(self, some, spec, factor, **hooks), batches, scale)

    return lambda: mock.patch.object(RankModel, "train_step", step)


def _mean_over_all(run: Callable[..., torch.Tensor], batches: Sequence[Batch], scale: float) -> torch.Tensor:
    return run(batches, 1 / sum(batch.tokens.numel() for batch in batches))


def _mean_of_means(run: Callable[..., torch.Tensor], batches: Sequence[Batch], scale: float) -> torch.Tensor:
    counts = [int((batch.labels != IGNORE).sum()) for batch in batches]
    assert len(set(counts)) > 1, "alike, the two means are one"
    return sum(run([batch], 1 / (count * len(batches))) for batch, count in zip(batches, counts, strict=True))


def full_steps_late() -> Any:
    """Full attention begins one step late."""
    honest = Trainer._spec
    return mock.patch.object(Trainer, "_spec", lambda self, step: honest(self, step - 1))


def unmasked_attention() -> Any:
    """Attention crosses the documents; labels do not."""
    honest = RankModel.place
    return mock.patch.object(RankModel, "place", lambda self, batch: honest(self, replace(batch, document_ids=None)))


def unmasked_labels() -> Any:
    """A document's last token is scored on the next document's first."""
    honest = TrainLoader._batch

    def batch(self: TrainLoader, indices: list[int]) -> Batch:
        windows = [self._dataset.window(index, False) for index in indices]
        return replace(honest(self, indices), labels=torch.stack([torch.from_numpy(w.labels) for w in windows]))

    return mock.patch.object(TrainLoader, "_batch", batch)


def paper_fraction() -> Any:
    """attention.group_fraction is not looked at: a group is a quarter."""
    return mock.patch.object(AttentionConfig, "group_tokens", lambda self, sequence: round(sequence / 8) * 2)


def whole_windows() -> Any:
    """eval.stride is not handed over."""
    honest = evaluator.evaluate
    return mock.patch.object(
        evaluator,
        "evaluate",
        lambda nll, tokens, lengths, windows, stride, **more: honest(nll, tokens, lengths, windows, None, **more),
    )


def eval_shifted() -> Any:
    """Evaluation attends as training does."""
    honest = Evaluator.__init__

    def made(self: Evaluator, plan: RunPlan, *args: Any, **more: Any) -> None:
        honest(self, replace(plan, full_attention=plan.attention), *args, **more)

    return mock.patch.object(Evaluator, "__init__", made)


def eval_dropout() -> Any:
    """Evaluation leaves the model in its training mode."""
    return mock.patch.object(RankModel, "eval", lambda self: self.train())


def other_mask() -> Any:
    """A recomputation draws dropout masks of its own instead of the forward's."""
    honest = megatron_random._set_all_rng_states

    def forgetful(*states: Any) -> None:
        if not forgetful.before_recomputation:  # type: ignore[attr-defined]
            honest(*states)
        forgetful.before_recomputation = not forgetful.before_recomputation  # type: ignore[attr-defined]

    forgetful.before_recomputation = True  # type: ignore[attr-defined]
    return mock.patch.object(megatron_random, "_set_all_rng_states", forgetful)


def shared_masks() -> Any:
    """Tensor-parallel ranks drop alike, though they hold other tokens or channels: one seed serves them all."""
    return mock.patch.object(megatron_random, "get_tensor_model_parallel_rank", lambda: 0)


PLANTS: dict[str, Plant] = {
    "weight decay": _without("weight_decay"),
    "betas": _without("betas"),
    "eps": _without("eps"),
    "clip": _without("clip"),
    "embedding's rate": one_rate,
    "cosine": _schedule(schedule="constant"),
    "cosine one step long": _schedule(total_steps=1),
    "warm-up one step long": _schedule(warmup_steps=1),
    "mean over all tokens": _train_step(_mean_over_all),
    "mean of micro-batch means": _train_step(_mean_of_means),
    "full_last_steps one late": full_steps_late,
    "attention over documents": unmasked_attention,
    "labels over documents": unmasked_labels,
    "group_fraction ignored": paper_fraction,
    "eval.stride ignored": whole_windows,
    "evaluation with S²": eval_shifted,
}
"""Without dropout."""
DROPOUT_PLANTS: dict[str, Plant] = {
    "dropout mask of the recomputation": other_mask,
    "evaluation with dropout": eval_dropout,
}
