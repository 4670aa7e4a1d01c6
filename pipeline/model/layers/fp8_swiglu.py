"""SwiGLU and its gradient, rounded to e4m3 as they are made: an FP8 product reads them, and nobody else.

Apart, SwiGLU's output [..., F] and the gradient of gate and up [..., 2 F] would be written in 16 bits and read twice,
the widest tensors of a layer.

Shapes: N tokens, F local FFN width.
"""

from __future__ import annotations

import torch

from pipeline.model.layers.fp8 import Rounded, fp8_kernels_for
from pipeline.model.layers.swiglu import swiglu, swiglu_gradient_


def round_swiglu(gate_up: torch.Tensor, fused: bool = True) -> Rounded:
    """silu(gate) * up [..., F] of [..., 2 F].

    Args:
        fused: use a kernel where there is one, which makes the same to the bit.
    """
    if not fused or fp8_kernels_for(gate_up, gate_up) is None:
        return Rounded.of(swiglu(gate_up, fused), fused=fused)
    from pipeline.model.layers import quantize_kernels

    pair = quantize_kernels.round_swiglu(gate_up.view(-1, gate_up.shape[-1]))
    return Rounded(*pair, gate_up.shape[:-1], gate_up.dtype)


def round_swiglu_gradient(
    gate_up: torch.Tensor, grads: torch.Tensor, factors: torch.Tensor, fused: bool = True
) -> Rounded:
    """The gradient of gate and up [..., 2 F], for that of their product [..., F], times factors.

    Args:
        gate_up: may be overwritten.
        factors: float32 [2 F]; see `fp8.round_rows`.
        fused: use a kernel where there is one, which makes the same to the bit.
    """
    if not fused or fp8_kernels_for(gate_up, gate_up, grads) is None:
        swiglu_gradient_(gate_up, grads, gate_up, fused)
        return Rounded.of(gate_up, factors, fused)
    from pipeline.model.layers import quantize_kernels

    rows = gate_up.view(-1, gate_up.shape[-1]), grads.view(-1, grads.shape[-1])
    return Rounded(*quantize_kernels.round_swiglu_gradient(*rows, factors), gate_up.shape[:-1], gate_up.dtype)
