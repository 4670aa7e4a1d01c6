"""RMSNorm as megatron-core's spec builds it, usable under sequence parallelism (mcore's torch norm is not)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch.autograd.function import once_differentiable

from pipeline.model.layers.kernel_choice import kernels_for
from pipeline.model.layers.recipe import Recipe, give_recipe

WIDEST = 1 << 14
"""Values of a row that the kernels hold at once."""


def _rms_norm(hidden_SBH: torch.Tensor, weight_H: torch.Tensor, eps: float, kernels: ModuleType | None) -> torch.Tensor:
    normed: torch.Tensor
    if kernels is None:
        normed = torch.nn.functional.rms_norm(hidden_SBH, weight_H.shape, weight_H, eps)
    else:
        normed = kernels.norm(hidden_SBH, weight_H, eps)
    return normed


def _normed(
    sources: Sequence[torch.Tensor], start: int, stop: int, eps: float, kernels: ModuleType | None
) -> torch.Tensor:
    input_SBH, weight_H = sources
    return _rms_norm(input_SBH[start:stop], weight_H, eps, kernels)


def norm_recipe(
    input_SBH: torch.Tensor, weight_H: torch.Tensor, eps: float, kernels: ModuleType | None = None
) -> Recipe:
    """How a norm's output is made: this keeps nothing that the norm does not keep."""
    return Recipe((input_SBH.detach(), weight_H.detach()), partial(_normed, eps=eps, kernels=kernels))


class _Norm(torch.autograd.Function):
    """`rms_norm` by kernels, its gradient in one pass; keeps its input and weight, as torch's does."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SBH: torch.Tensor, weight_H: torch.Tensor, eps: float, kernels: ModuleType
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_SBH, weight_H)
        ctx.eps, ctx.gradient = eps, kernels.norm_gradient
        return _rms_norm(hidden_SBH, weight_H, eps, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        (grad,) = grads
        hidden_SBH, weight_H = ctx.saved_tensors
        result, weight_grad = ctx.gradient(hidden_SBH, weight_H, grad.contiguous(), ctx.eps)
        return result, weight_grad if ctx.needs_input_grad[1] else None, None, None


class _NormBesideStream(torch.autograd.Function):
    """(`rms_norm`, its input) of which both are used: their gradients meet in one pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SBH: torch.Tensor, weight_H: torch.Tensor, eps: float, kernels: ModuleType
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(hidden_SBH, weight_H)
        ctx.eps, ctx.gradient = eps, kernels.norm_gradient
        return _rms_norm(hidden_SBH, weight_H, eps, kernels), hidden_SBH.view_as(hidden_SBH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        grad, stream = (grad.contiguous() for grad in grads)
        result, weight_grad = ctx.gradient(*ctx.saved_tensors, grad, ctx.eps, stream)
        return result, weight_grad if ctx.needs_input_grad[1] else None, None, None


class _NormOfSum(torch.autograd.Function):
    """(x + residual, its `rms_norm`), both in one pass, and their gradients in another."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SBH: torch.Tensor,
        residual_SBH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        kernels: ModuleType,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed = kernels.norm_of_sum(x_SBH, residual_SBH, weight_H, eps)
        ctx.save_for_backward(total, weight_H)
        ctx.eps, ctx.gradient = eps, kernels.norm_gradient
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        stream, grad = (grad.contiguous() for grad in grads)
        result, weight_grad = ctx.gradient(*ctx.saved_tensors, grad, ctx.eps, stream)
        return result, result, weight_grad if ctx.needs_input_grad[2] else None, None, None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (arXiv 1910.07467, equation 4), statistics in fp32.

    Args:
        config: megatron's configuration; its `params_dtype` and device rules place the weight.
        hidden_size: width H of the last dimension.
        eps: added to the mean square.
        fused: use kernels.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, fused: bool = True) -> None:
        super().__init__()
        self.eps, self.fused = eps, fused
        # None: the default device, which megatron's linears take too when they initialize on the CPU.
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Under sequence parallelism each rank sees a slice of the tokens, so this gradient is partial: the mark tells
        # the reduction (megatron's own convention).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def _kernels(self, hidden_SBH: torch.Tensor) -> ModuleType | None:
        # With and without gradients: a recomputation must make what the first pass made, to the bit.
        wanted = self.fused and self.weight.shape[0] <= WIDEST
        return kernels_for(hidden_SBH, hidden_SBH, self.weight) if wanted else None

    def forward(self, hidden_SBH: torch.Tensor) -> Any:
        """Normalize over the last dimension; shape and dtype unchanged."""
        kernels = self._kernels(hidden_SBH)
        if kernels is not None:
            output: torch.Tensor = _Norm.apply(hidden_SBH, self.weight, self.eps, kernels)
        else:
            output = _rms_norm(hidden_SBH, self.weight, self.eps, None)
        give_recipe(output, norm_recipe(hidden_SBH, self.weight, self.eps, kernels))
        return output


class StreamNorm(RMSNorm):
    """The norm at the head of a layer's half, beside which the residual stream goes on: megatron's layer takes both."""

    def of_sum(self, x_SBH: torch.Tensor, residual_SBH: torch.Tensor) -> torch.Tensor | None:
        """x + residual [S, B, H] and, in the same pass, what `forward` will return of it; None: no kernel can.

        megatron's layer calls its sum and its norm apart: what is normed travels with the sum, as an attribute.
        """
        kernels = self._kernels(x_SBH)
        if kernels is None or not residual_SBH.is_contiguous() or residual_SBH.dtype is not x_SBH.dtype:
            return None
        total: torch.Tensor
        total, normed = _NormOfSum.apply(x_SBH, residual_SBH, self.weight, self.eps, kernels)
        give_recipe(normed, norm_recipe(total, self.weight, self.eps, kernels))
        total.normed = normed  # type: ignore[attr-defined]
        return total

    def forward(self, hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, B, H] -> (normed, the stream); see `RMSNorm.forward`."""
        normed = vars(hidden_SBH).pop("normed", None)
        if normed is not None:
            return normed, hidden_SBH
        kernels = self._kernels(hidden_SBH)
        if kernels is None or not hidden_SBH.requires_grad:
            return super().forward(hidden_SBH), hidden_SBH
        output, stream = _NormBesideStream.apply(hidden_SBH, self.weight, self.eps, kernels)
        give_recipe(output, norm_recipe(hidden_SBH, self.weight, self.eps, kernels))
        return output, stream
