"""What an optimizer step sums over ranks: gradients, by how each parameter is placed, the loss, the squared norm."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import Parameter

from parallel.collectives import sum_buckets, sum_over
from parallel.groups import Groups
from pipeline.model.part import ModelPart
from pipeline.optim import TrainableAdamW


class GradientReduction:
    """Sums of one run.

    Over dp x cp every gradient is summed: ranks see different tokens. Over tp only those of parameters marked
    `sequence_parallel` (norms, the replicated LoRA factors): each rank's is made from its slice of the tokens. A tied
    embedding held by the first and the last pipeline stage gets the sum of both gradients.

    Args:
        groups: the grid.
        model: this rank's part, its trainable parameters marked.
    """

    def __init__(self, groups: Groups, model: ModelPart) -> None:
        self.groups = groups
        trained = [parameter for _, parameter in model.canonical_parameters() if parameter.requires_grad]
        self._partial: list[Parameter] = []
        if groups.plan.tp > 1:
            self._partial = [parameter for parameter in trained if getattr(parameter, "sequence_parallel", False)]
        self._tied: list[Parameter] = []
        if model.arch.tied and groups.plan.pp > 1 and groups.stage in (0, groups.plan.pp - 1):
            self._tied = [
                parameter
                for name, parameter in model.canonical_parameters()
                if name == "embedding.weight" and parameter.requires_grad
            ]

    def finish(self, optimizer: TrainableAdamW) -> None:
        """Sum the gradients in `parameter.main_grad`; collective."""
        sum_buckets(self.groups.data, optimizer.flat_gradients())
        if self._partial:
            gradients = [main_grad(parameter) for parameter in self._partial]
            # One collective for hundreds of small tensors.
            packed = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(packed, group=self.groups.collection.tp)
            for gradient, part in zip(gradients, packed.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for parameter in self._tied:
            dist.all_reduce(main_grad(parameter), group=self.groups.collection.embd)

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
