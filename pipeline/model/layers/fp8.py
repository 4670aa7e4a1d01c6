"""Rows rounded to e4m3 with a scale each; so are gate and up while they wait for their backward, a scale for each.

A value's relative error is at most 2^-4 (three bits of mantissa), and values below amax 2^-15 have an absolute one of
at most amax 2^-19. The forward pass is made with the values as they are; of the backward, the gradients of gate and up
alone are made with rounded ones: on random numbers they are off by 3% (root mean square), and unbiased. The formats:
arXiv 2209.05433.

Shapes: N rows, K their width, F local FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from pipeline.model.layers.kernel_choice import kernels_for

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3's values."""
CAPABILITY = (8, 9)
"""Oldest CUDA devices whose kernels know e4m3; on others torch's own operations do it, in more passes."""


def fp8_kernels_for(first: torch.Tensor, *others: torch.Tensor) -> ModuleType | None:
    """The module `fp8_kernels` where it can serve."""
    if kernels_for(first, *others) is None or torch.cuda.get_device_capability(first.device) < CAPABILITY:
        return None
    from pipeline.model.layers import fp8_kernels  # imports triton, which not every machine has

    return fp8_kernels


def round_rows(
    rows_NK: torch.Tensor, factors_K: torch.Tensor | None = None, fused: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] of any float dtype -> e4m3 [N, K] and float32 scales [N, 1]; their product is the rows again.

    Args:
        factors_K: float32; what the columns are multiplied with before they are rounded.
        fused: use a kernel where there is one.
    """
    if fused and fp8_kernels_for(rows_NK, rows_NK) is not None:
        from pipeline.model.layers import quantize_kernels

        pair: tuple[torch.Tensor, torch.Tensor] = quantize_kernels.round_rows(rows_NK, factors_K)
        return pair
    values = rows_NK.float() if factors_K is None else rows_NK.float() * factors_K
    # A row of zeros stays one.
    scales = (values.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (values * scales.reciprocal()).clamp_(-LARGEST, LARGEST).to(E4M3), scales


def transposed(matrix_OI: torch.Tensor, fused: bool = True) -> torch.Tensor:
    """e4m3 [O, I] as contiguous [I, O].

    Args:
        fused: use a kernel where there is one.
    """
    if fused and fp8_kernels_for(matrix_OI, matrix_OI) is not None:
        from pipeline.model.layers import quantize_kernels

        result: torch.Tensor = quantize_kernels.transposed(matrix_OI)
        return result
    return matrix_OI.t().contiguous()


@dataclass(frozen=True)
class Rounded:
    """[..., K] as `round_rows` rounds it."""

    values: torch.Tensor
    """e4m3 [N, K]."""
    scales: torch.Tensor
    """float32 [N, 1]."""
    leading: torch.Size
    """All dimensions but the last of what was rounded."""
    dtype: torch.dtype
    """Of what was rounded."""

    @classmethod
    def of(cls, rows: torch.Tensor, factors_K: torch.Tensor | None = None, fused: bool = True) -> Rounded:
        """[..., K]; see `round_rows`."""
        pair = round_rows(rows.reshape(-1, rows.shape[-1]), factors_K, fused)
        return cls(*pair, rows.shape[:-1], rows.dtype)


def to_fp8(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., 2 F] of any float dtype -> e4m3 of the same shape, and what to multiply each half with, fp32 [..., 2]."""
    kernels = fp8_kernels_for(gate_up, gate_up)
    if kernels is not None:
        pair: tuple[torch.Tensor, torch.Tensor] = kernels.to_fp8(gate_up)
        return pair
    rounded, scales = round_rows(gate_up.reshape(-1, gate_up.shape[-1] // 2))
    return rounded.view(gate_up.shape), scales.view(*gate_up.shape[:-1], 2)


def from_fp8(rounded: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `to_fp8` rounded, in `dtype`."""
    return (rounded.unflatten(-1, (2, -1)).float() * scales[..., None]).to(dtype).flatten(-2)


def rounded_gradient(rounded: torch.Tensor, scales: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """SwiGLU's gradient [..., 2 F] straight from what `to_fp8` made, in one pass; None where no kernel can."""
    kernels = fp8_kernels_for(grad, grad)
    if kernels is None:
        return None
    result: torch.Tensor = kernels.gradient(rounded, scales, grad)
    return result
