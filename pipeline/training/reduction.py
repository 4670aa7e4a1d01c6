"""What an optimizer step sums over ranks: gradients, by how each parameter is placed, the loss, the squared norm."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from parallel.world.collectives import sum_over
from parallel.world.groups import Groups
from pipeline.model.rank_model import RankModel
from pipeline.training.optimizer import TrainableAdamW


class GradientReduction:
    """Sums of one run.

    Over dp x cp every gradient is summed: ranks see different tokens. Over tp only those of parameters marked
    `sequence_parallel` (norms, the replicated LoRA factors): each rank's is made from its slice of the tokens. A tied
    embedding held by the first and the last pipeline stage gets the sum of both gradients.

    Args:
        groups: the grid.
        model: this rank's part, its trainable parameters marked.
    """

    def __init__(self, groups: Groups, model: RankModel) -> None:
        self.groups = groups
        self._tied = model.arch.tied and groups.plan.pp > 1 and groups.stage in (0, groups.plan.pp - 1)
        for name, parameter in model.canonical_parameters():
            if self._tied and name == "embedding.weight":
                parameter.tied_over_stages = True  # type: ignore[attr-defined]

    def finish(self, optimizer: TrainableAdamW) -> None:
        """Sum the gradients in `parameter.main_grad`; collective."""
        optimizer.reduce_gradients()
        if self.groups.plan.tp > 1:
            optimizer.sum_marked("sequence_parallel", self.groups.collection.tp)
        if self._tied:
            optimizer.sum_marked("tied_over_stages", self.groups.collection.embd)

    def total(self, loss: torch.Tensor) -> torch.Tensor:
        """The step's summed loss from each rank's share (zero but on the last stage), alike on every rank."""
        sum_over(self.groups.data, loss)
        return sum_over(self.groups.collection.pp, loss)

    def squares(self, squares: torch.Tensor) -> torch.Tensor:
        """fp64 [2] squared gradient sums of (replicated, tensor-parallel) parameters, over the whole model."""
        if self.groups.plan.tp > 1:
            sharded = squares[1:].clone()
            squares[1:] = sum_over(self.groups.collection.tp, sharded)
        return sum_over(self.groups.collection.pp, squares)


def main_grad(parameter: Parameter) -> torch.Tensor:
    """The fp32 gradient sum the optimizer keeps for a parameter."""
    gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient
