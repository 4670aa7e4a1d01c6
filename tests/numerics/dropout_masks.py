"""The dropout masks a run draws, recorded on every rank, and put together for an oracle that is to drop the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import megatron.core.tensor_parallel.random as megatron_random
import torch

from pipeline.model.layers.lora import AdapterSet
from pipeline.model.rank_model import RankModel

Masks = list[list[tuple[tuple[str, ...], torch.Tensor]]]
"""By training step: (targets that share it, bool [S, B, I], this rank's part) in the order of the forwards."""
ROW_PARALLEL = ("o", "down")
"""Their input channels are spread over tensor-parallel ranks; the others' tokens are."""


@contextlib.contextmanager
def recorded() -> Iterator[Masks]:
    """Record what LoRA's inputs lose in training forwards; recomputations are the product's business."""
    found: Masks = []
    inside = False
    drop, train_step = AdapterSet._drop, RankModel.train_step

    def watched_drop(self: AdapterSet, x: torch.Tensor) -> torch.Tensor:
        out = drop(self, x)
        again = megatron_random.is_checkpointing() and torch.is_grad_enabled()
        if inside and not again:
            found[-1].append((self.names, (out != 0) | (x == 0)))
        return out

    def watched_step(self: RankModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal inside
        found.append([])
        inside = True
        try:
            return train_step(self, *args, **kwargs)
        finally:
            inside = False

    with (
        mock.patch.object(AdapterSet, "_drop", watched_drop),
        mock.patch.object(RankModel, "train_step", watched_step),
    ):
        yield found


class Replay:
    """Drops in the oracle what the product's ranks dropped.

    Args:
        ranks: the masks of every rank, tensor-parallel neighbours first, then context-parallel ones, then replicas.
        tp, cp: the axes; replicas have consecutive parts of a step's micro-batches.
        layers: of the model.
        rate: lora.dropout.
    """

    def __init__(self, ranks: list[Masks], tp: int, cp: int, layers: int, rate: float) -> None:
        self.ranks, self.tp, self.cp, self.layers, self.rate = ranks, tp, cp, layers, rate

    def __call__(self, step: int, micro: int, module: str, x_BSI: torch.Tensor) -> torch.Tensor:
        """See `run_oracle.Drop`."""
        layer, target = int(module.split(".")[2]), module.rsplit(".")[-1].removesuffix("_proj")
        mine = [[mask for targets, mask in rank[step] if target in targets] for rank in self.ranks]
        replica, number = divmod(micro, len(mine[0]) // self.layers)
        size = self.tp * self.cp
        pieces = [masks[number * self.layers + layer] for masks in mine[replica * size : (replica + 1) * size]]
        axis = 2 if target in ROW_PARALLEL else 0
        shards = [torch.cat(pieces[first : first + self.tp], axis) for first in range(0, len(pieces), self.tp)]
        kept_SBI = torch.cat(shards)[: x_BSI.shape[1]]  # a padded last shard holds more
        return x_BSI * kept_SBI.transpose(0, 1) / (1 - self.rate)


def agreement(ranks: list[Masks]) -> tuple[float, float]:
    """Share of elements kept, and the largest share in which two masks of one shape agree, of any ranks and places."""
    masks = [mask.flatten() for steps in ranks for calls in steps for _, mask in calls]
    kept = float(torch.cat(masks).float().mean())
    alike = [
        float((one == other).float().mean())
        for number, one in enumerate(masks)
        for other in masks[:number]
        if one.shape == other.shape
    ]
    return kept, max(alike)
