"""The last matrix product of a layer, which a recomputation need not repeat.

A checkpointed layer runs a second time in the backward to restore what its gradients need. The values that leave the
layer are not among them: they exist already. So the product that makes them, a quarter of a Llama layer's frozen ones,
is skipped then; only its place in the graph is kept. An adapter beside it still runs: its gradients need what it makes.

Shapes: S tokens, B batch, I input width, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear, reduce_scatter_to_sequence_parallel_region


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as only activation checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


class _Skipped(torch.autograd.Function):
    """x W^T for a frozen W: values never computed, the gradient right."""

    @staticmethod
    def forward(ctx: Any, input_SBI: torch.Tensor, weight_HI: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight_HI)
        return input_SBI.new_empty((*input_SBI.shape[:-1], weight_HI.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        # Flattened: matmul does not fold a batch of one.
        return (grad.reshape(-1, grad.shape[-1]) @ weight).view(*grad.shape[:-1], weight.shape[1]), None


class LastRowParallelLinear(RowParallelLinear):
    """Row-parallel linear whose output leaves the layer (down_proj): not computed in a recomputation if frozen."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([S, B, H], bias to be added later or None); values are arbitrary while recomputing."""
        if not recomputing() or self.weight.requires_grad or self.bias is not None or not self.input_is_parallel:
            return super().forward(input_)
        output = _Skipped.apply(input_, self.weight)
        if self.tp_group.size() > 1:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return output, None
