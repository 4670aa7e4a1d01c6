"""SwiGLU's input in 8 bits, in Triton: rounded in one pass, and its gradient in another. See `layers.fp8`.

Apart from `triton_kernels`, whose kernels any GPU that Triton knows can run: these need one that knows e4m3.

Shapes: F local FFN width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.model.layers.triton_kernels import WHY

_BLOCK = 1024


@triton.jit
def _to_fp8(x_ptr, out_ptr, scale_ptr, width, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    half = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(x_ptr + half * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x)) / 448.0
    rounded = (x / tl.maximum(scale, 1.1754943508222875e-38)).to(tl.float8e4nv)
    tl.store(out_ptr + half * width + column, rounded, mask=inside)
    tl.store(scale_ptr + half, scale)


def to_fp8(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.to_fp8`; contiguous [..., 2 F]."""
    width = gate_up.shape[-1] // 2
    out = torch.empty_like(gate_up, dtype=torch.float8_e4m3fn)
    scales = gate_up.new_empty((*gate_up.shape[:-1], 2), dtype=torch.float32)
    if out.numel():
        _to_fp8[(scales.numel(),)](gate_up, out, scales, width, WIDTH=triton.next_power_of_2(width), num_warps=16)
    return out, scales


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    rounded_ptr, scale_ptr, grad_ptr, result_ptr, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = row * 2 * width + columns
    dtype = result_ptr.dtype.element_ty
    # As `fp8.from_fp8` gives them back.
    gate = tl.load(rounded_ptr + place, mask=inside).to(tl.float32) * tl.load(scale_ptr + 2 * row)
    up = tl.load(rounded_ptr + place + width, mask=inside).to(tl.float32) * tl.load(scale_ptr + 2 * row + 1)
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + columns, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(result_ptr + place, (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=inside)
    tl.store(result_ptr + place + width, (grad * gate * sigmoid).to(dtype), mask=inside)


def gradient(rounded: torch.Tensor, scales: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient [..., 2 F] of gate and up, which `to_fp8` rounded, for that of their product, `grad` [..., F]."""
    width = grad.shape[-1]
    assert rounded.shape == (*grad.shape[:-1], 2 * width) and scales.shape == (*grad.shape[:-1], 2), WHY
    assert rounded.is_contiguous() and scales.is_contiguous() and grad.is_contiguous(), WHY
    result = grad.new_empty(rounded.shape)
    if grad.numel():
        grid = grad.numel() // width, triton.cdiv(width, _BLOCK)
        _gradient[grid](rounded, scales, grad, result, width, BLOCK=_BLOCK)
    return result
