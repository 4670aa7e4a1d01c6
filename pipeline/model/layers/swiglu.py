"""SwiGLU (arXiv 2002.05202, equation 6) and its gradient, with torch alone or by kernels."""

from __future__ import annotations

from typing import cast

import torch
from torch.nn import functional

from pipeline.model.layers.kernel_choice import kernels_for

CHUNK_ELEMENTS = 1 << 26
"""Elements of the halves worked on at once in the backward: their scratch is 128 MiB a tensor in bf16."""


def swiglu(gate_up: torch.Tensor, fused: bool = True) -> torch.Tensor:
    """silu(gate) * up of [gate; up] side by side: [..., 2 F] -> [..., F], any float dtype.

    Args:
        fused: use the kernel.
    """
    kernels = kernels_for(gate_up, gate_up) if fused else None
    if kernels is not None:
        return cast(torch.Tensor, kernels.swiglu(gate_up))
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def swiglu_gradient_(gate_up: torch.Tensor, grad: torch.Tensor, result: torch.Tensor, fused: bool = True) -> None:
    """Write the gradient of `gate_up` [..., 2 F] for `grad` [..., F] into `result`, contiguous; it may be `gate_up`.

    Chunk by chunk, where kernels cannot do it in place: the widest tensors of a layer meet here.
    """
    kernels = kernels_for(gate_up, gate_up, grad, result) if fused else None
    if kernels is not None:
        kernels.swiglu_gradient_(gate_up, grad, result)
        # Torch's own operations tell autograd by themselves that a tensor was written to.
        torch.autograd.graph.increment_version(result)
        return
    width = grad.shape[-1]
    rows = max(1, CHUNK_ELEMENTS // max(1, width))
    # `view` refuses what `flatten` would copy, and then nothing would be written to `result`.
    whole = gate_up.flatten(0, -2), result.view(-1, 2 * width), grad.flatten(0, -2)
    pieces = (tensor.split(rows) for tensor in whole)
    for source, target, slope in zip(*pieces, strict=True):
        gate, up = source.chunk(2, dim=-1)
        # The operations of eager autograd, so that results are the same to the bit.
        scratch = slope * up
        grad_up = functional.silu(gate).mul_(slope)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=scratch)
        target[:, :width].copy_(scratch)
        target[:, width:].copy_(grad_up)
