"""The sums of a layer with its residual stream; the last one is not made while recomputing.

The sum that leaves a checkpointed layer exists already, so that its recomputation needs only its place in the graph:
one hidden state less at the memory peak, and one pass over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.model.layers.norm import StreamNorm
from pipeline.model.layers.recomputation import placeholder, recomputing

Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]
"""megatron's call: ((x, bias), residual, dropout probability) -> sum."""


def _beside(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of the residual stream [S, B, H] the tokens that x [T, B, H] has, the last T: a streamed chunk's first pass drops
    others within a layer (`planning.first_pass`)."""
    return residual if len(residual) == len(x) else residual[len(residual) - len(x) :]


class _Skipped(torch.autograd.Function):
    """x + residual, never computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return placeholder(residual, residual.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], grads[0]


def _add(x_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
    x, bias = x_and_bias
    assert bias is None and not dropout, "megatron_config.transformer_config has neither"
    residual = _beside(residual, x)
    if x.requires_grad:
        return residual + x
    # Made without gradients (a checkpointed layer's first pass, evaluation), and nobody else reads it. megatron enables
    # them around this call.
    with torch.no_grad():
        return x.add_(residual)


def _add_last(
    x_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
) -> torch.Tensor:
    if not recomputing():
        return _add(x_and_bias, residual, dropout)
    skipped: torch.Tensor = _Skipped.apply(x_and_bias[0], residual)
    return skipped


def add_before(norm: StreamNorm) -> Callable[[bool, bool], Add]:
    """`residual_add` that also norms the sum where one kernel makes both."""

    def add(
        x_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        x, bias = x_and_bias
        total = norm.of_sum(x, _beside(residual, x)) if bias is None and not dropout else None
        return _add(x_and_bias, residual, dropout) if total is None else total

    return lambda training, fused: add


def residual_add(training: bool, fused: bool) -> Add:
    """Attention's output plus the residual stream."""
    return _add


def last_residual_add(training: bool, fused: bool) -> Add:
    """The MLP's output plus the residual stream, which leaves the layer; values are arbitrary while recomputing."""
    return _add_last


def _add_plainly(
    x_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
) -> torch.Tensor:
    return _beside(residual, x_and_bias[0]) + x_and_bias[0]


def plain_add(training: bool, fused: bool) -> Add:
    """Either sum, made whenever it is asked for: for comparison."""
    return _add_plainly
