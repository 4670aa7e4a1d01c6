"""One optimizer step of a model that a benchmark made, timed."""

from __future__ import annotations

import math
import time

import torch

from parallel.errors import LongspanError
from parallel.world.groups import Groups
from pipeline.data.loader import Batch
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import trainable
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.reduction import GradientReduction

RATES = {"lora": 2e-5, "other": 2e-5}


class TimedStep:
    """Takes optimizer steps, as a run does, on random tokens.

    Args:
        model: on this rank, training, with what trains marked.
        offload: keep the optimizer's state in host memory.
    """

    def __init__(self, model: RankModel, groups: Groups, offload: bool = False) -> None:
        named = ((name, "lora" if kind == "lora" else "other", value) for name, kind, value in trainable(model))
        self._model, self._optimizer = model, TrainableAdamW(named, group=groups.data, offload=offload)
        self._reduction = GradientReduction(groups, model)

    def take(self, rows: int, length: int, micro_batches: int, spec: AttentionSpec, seed: int) -> float:
        """Seconds of a step of `micro_batches` times `rows` sequences of `length` tokens.

        Args:
            seed: of the tokens: repeated ones could flatter caches.

        Raises:
            LongspanError: gradients were not finite: arithmetic on NaN and zeros is faster than on numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self._model.arch.vocab, (rows, length), generator=generator)
        batches = [Batch(tokens, tokens, None)] * micro_batches
        torch.cuda.synchronize()
        began = time.perf_counter()
        self._optimizer.zero_grad()
        self._model.train_step(batches, spec, 1 / tokens.numel(), self._optimizer.arm_reduce)
        self._reduction.finish(self._optimizer)
        norm = float(self._optimizer.grad_norm(self._reduction.squares))
        self._optimizer.step(RATES, norm)
        torch.cuda.synchronize()
        if not 0 < norm < math.inf:
            raise LongspanError(f"The gradient norm of step {seed} is {norm}: its time says nothing about training.")
        return time.perf_counter() - began
