"""LoRA's products as autograd functions: what they keep, what they make again, and what they add in place.

Shapes: S tokens, B batch, I input width, O output width, R rank of all parts together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.model.layers.frozen_weight import FrozenWeight
from pipeline.model.layers.kernel_choice import kernels_for
from pipeline.model.layers.recipe import Recipe
from pipeline.model.layers.recomputation import placeholder

MOST_COLUMNS = 128
"""Ranks of all parts of a fused projection together that the update's kernel takes."""


def low_rank(input_SBI: torch.Tensor, a_RI: torch.Tensor) -> torch.Tensor:
    """x A^T: [S, B, I] -> [S, B, n R].

    Flattened: for three dimensions torch takes another kernel where the input requires a gradient than in the first
    pass of a checkpointed layer, and the last bits would depend on the recompute policy.
    """
    return functional.linear(input_SBI.flatten(0, -2), a_RI).view(*input_SBI.shape[:-1], a_RI.shape[0])


class OfMade(torch.autograd.Function):
    """x A^T for an x that is made again in the backward: it need not be kept."""

    @staticmethod
    def forward(ctx: Any, input_SBI: torch.Tensor, a_RI: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        ctx.save_for_backward(a_RI, *recipe.sources)
        ctx.make, ctx.tokens = recipe.make, input_SBI.shape[0]
        return low_rank(input_SBI, a_RI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad,) = grads
        a_RI, *sources = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_input = (flat @ a_RI).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        grad_a = None
        if ctx.needs_input_grad[1]:
            grad_a = flat.t() @ ctx.make(sources, 0, ctx.tokens).flatten(0, -2)
        return grad_input, grad_a, None


def add_update(base: torch.Tensor, low: torch.Tensor, b_OR: torch.Tensor, scale: float, fused: bool) -> None:
    """base [n, O] += scale * low [n, R] B^T, in place."""
    # In fp32 tensor cores would round the factors to tf32.
    half = fused and base.dtype is not torch.float32 and b_OR.shape[1] <= MOST_COLUMNS
    kernels = kernels_for(base, base, low, b_OR) if half else None
    if kernels is None:
        base.addmm_(low, b_OR.t(), alpha=scale)
    else:
        kernels.add_update_(base, low, b_OR, scale)


class AddUpdate(torch.autograd.Function):
    """base + scale * low B^T, over the base output, which nothing else keeps."""

    @staticmethod
    def forward(
        ctx: Any, base_SBO: torch.Tensor, low_SBR: torch.Tensor, b_OR: torch.Tensor, scale: float, fused: bool = True
    ) -> torch.Tensor:
        ctx.save_for_backward(low_SBR, b_OR)
        ctx.scale = scale
        ctx.mark_dirty(base_SBO)
        add_update(base_SBO.view(-1, base_SBO.shape[-1]), low_SBR.flatten(0, -2), b_OR, scale, fused)
        return base_SBO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        low, b_OR = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_low = (flat @ b_OR).mul_(ctx.scale).view(low.shape) if ctx.needs_input_grad[1] else None
        grad_b = (flat.t() @ low.flatten(0, -2)).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        return grad, grad_low, grad_b, None, None


class Joint(torch.autograd.Function):
    """A frozen product and its adapters, x W^T + scale * x A^T B^T, on one rank: one gradient for x, in one pass more.

    Apart, the adapters' gradient of x would be written, and both read and their sum written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        weight: FrozenWeight,
        bias_O: torch.Tensor | None,
        scale: float,
        recipe: Recipe | None,
        skip: bool,
        fused: bool,
    ) -> torch.Tensor:
        low = low_rank(x, a_RI)
        if skip:
            out = placeholder(x, (*x.shape[:-1], b_OR.shape[0]))
        else:
            out = weight.product(x)
            if bias_O is not None:
                out.add_(bias_O)
            add_update(out.view(-1, out.shape[-1]), low.flatten(0, -2), b_OR, scale, fused)
        ctx.save_for_backward(a_RI, b_OR, low, *((x,) if recipe is None else recipe.sources))
        ctx.weight, ctx.scale, ctx.tokens = weight, scale, x.shape[0]
        ctx.make = None if recipe is None else recipe.make
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0].contiguous()
        a_RI, b_OR, low, *sources = ctx.saved_tensors
        flat, wanted = grad.flatten(0, -2), ctx.needs_input_grad
        grad_low = (flat @ b_OR).mul_(ctx.scale)
        grad_x = grad_a = grad_b = None
        if wanted[0]:
            grad_x = ctx.weight.grad_input(grad)
            grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_low, a_RI)
        if wanted[1]:
            x = sources[0] if ctx.make is None else ctx.make(sources, 0, ctx.tokens)
            grad_a = grad_low.t() @ x.flatten(0, -2)
        if wanted[2]:
            grad_b = (flat.t() @ low.flatten(0, -2)).mul_(ctx.scale)
        return grad_x, grad_a, grad_b, None, None, None, None, None, None
