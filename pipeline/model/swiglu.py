"""SwiGLU (arXiv 2002.05202, equation 6) that keeps nothing for the backward but its input."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up. Eager autograd would keep silu(gate) and a copy of `up` too: half as much again as the input."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        # The operations of eager autograd, so that results are the same to the bit, but each half is its own scratch:
        # this is where a recomputed layer's memory peaks.
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        return result


class SwiGlu(torch.nn.Module):
    """The MLP's activation as megatron-core's spec builds it: [gate; up] side by side, [S, B, 2 F] -> [S, B, F]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Any float dtype; shape and dtype of the halves."""
        return _SwiGlu.apply(gate_up)
