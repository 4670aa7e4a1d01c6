"""The MLP's activation, SwiGLU, that keeps nothing for the backward but its input, or a smaller form of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.model.layers.fp8 import from_fp8, rounded_gradient, to_fp8
from pipeline.model.layers.parking import Parking, parking_of
from pipeline.model.layers.recipe import Recipe, give_recipe
from pipeline.model.layers.swiglu import swiglu, swiglu_gradient_
from pipeline.planning.recompute import RecomputePolicy

ELSEWHERE = (RecomputePolicy.FP8, RecomputePolicy.HOST)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up. Eager autograd would keep silu(gate) and a copy of `up` too: half as much again as the input.

    The backward writes the gradient over its saved input. A second backward through the same forward is then refused
    by autograd, which sees that a saved tensor was modified. An input that the user made (a leaf), or a view of one, is
    left alone.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        base = gate_up if gate_up._base is None else gate_up._base
        ctx.reuse = base.grad_fn is not None and gate_up.is_contiguous()
        return swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        result = gate_up if ctx.reuse else torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        swiglu_gradient_(gate_up, grad, result)
        return result


class _RoundedSwiGlu(torch.autograd.Function):
    """silu(gate) * up that keeps its input in 8 bits."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*to_fp8(gate_up))
        ctx.dtype = gate_up.dtype
        return swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].contiguous()
        rounded, scales = ctx.saved_tensors
        result = rounded_gradient(rounded, scales, grad)
        if result is None:
            result = from_fp8(rounded, scales, ctx.dtype)
            swiglu_gradient_(result, grad, result)
        return result


class _ParkedSwiGlu(torch.autograd.Function):
    """silu(gate) * up that keeps its input in host memory."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, parking: Parking) -> torch.Tensor:
        base = gate_up if gate_up._base is None else gate_up._base
        # An input that the user made is not to be overwritten, if it is still here in the backward.
        own = gate_up if base.grad_fn is not None and gate_up.is_contiguous() else gate_up.contiguous().clone()
        ctx.parking, ctx.parked = parking, parking.park(own)
        return swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        gate_up = ctx.parking.take(ctx.parked)
        swiglu_gradient_(gate_up, grad.contiguous(), gate_up)
        return gate_up, None


def _product(sources: Sequence[torch.Tensor], start: int, stop: int) -> torch.Tensor:
    return swiglu(sources[0][start:stop])


class SwiGlu(torch.nn.Module):
    """The MLP's activation as megatron-core's spec builds it: [gate; up] side by side, [S, B, 2 F] -> [S, B, F].

    Args:
        recompute: of the layer it is in.
    """

    def __init__(self, config: TransformerConfig, recompute: RecomputePolicy = RecomputePolicy.POINTWISE) -> None:
        super().__init__()
        self.recompute = recompute

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Any float dtype; shape and dtype of the halves."""
        product: torch.Tensor
        if torch.is_grad_enabled() and gate_up.requires_grad and self.recompute in ELSEWHERE:
            if self.recompute is RecomputePolicy.FP8:
                product = _RoundedSwiGlu.apply(gate_up)
            else:
                product = _ParkedSwiGlu.apply(gate_up, parking_of(gate_up.device))
            # No recipe: that would keep what was put away.
            return product
        product = _SwiGlu.apply(gate_up)
        give_recipe(product, Recipe((gate_up.detach(),), _product))
        return product


class EagerSwiGlu(SwiGlu):
    """The same by torch's own operations, autograd keeping what it will: for comparison."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As `SwiGlu.forward`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
