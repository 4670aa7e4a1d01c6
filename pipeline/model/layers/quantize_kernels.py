"""Frozen matrices in 8 and 4 bits, in Triton: rows rounded to e4m3 as they are read, SwiGLU's as they are made; bytes
transposed and NF4 dequantized in one pass.

See `layers.fp8` and `layers.quantized_weight`, whose torch operations make the same in many passes with float32 copies
of everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.model.layers.triton_kernels import WHY
from pipeline.planning.base_form import BLOCK, GROUP

_COLUMNS = 4096
_BYTES = 1024
_TILE = 128


@triton.jit
def _magnitude(x):  # type: ignore[no-untyped-def]
    # As an integer: magnitudes order alike, and NaN beyond all, which a maximum of floats here would leave out.
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest):  # type: ignore[no-untyped-def]
    # Of a row's magnitudes: its scale, and one over it; both NaN if one of them is, or the row would come out finite.
    amax = tl.max(largest).to(tl.float32, bitcast=True)
    scale = tl.where(amax == amax, tl.maximum(amax / 448.0, 1.1754943508222875e-38), amax)
    # One division a row: of every value, they would bound the kernel.
    return scale, 1.0 / scale


@triton.jit
def _e4m3(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _round_rows(  # type: ignore[no-untyped-def]
    x_ptr, factor_ptr, out_ptr, scale_ptr, width, FACTORS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    largest = tl.zeros((COLUMNS,), dtype=tl.int32)
    # A row stays in registers between its two uses.
    kept = ()
    for part in tl.static_range(PARTS):
        at = part * COLUMNS + column
        x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)
        kept = kept + (x,)  # type: ignore[assignment]
        x = x.to(tl.float32)
        if FACTORS:
            x = x * tl.load(factor_ptr + at, mask=at < width, other=0.0)
        largest = tl.maximum(largest, _magnitude(x))
    scale, inverse = _scale(largest)
    for part in tl.static_range(PARTS):
        at = part * COLUMNS + column
        x = kept[part].to(tl.float32)
        if FACTORS:
            x = x * tl.load(factor_ptr + at, mask=at < width, other=0.0)
        tl.store(out_ptr + row * width + at, _e4m3(x * inverse), mask=at < width)
    tl.store(scale_ptr + row, scale)


def _parts(width: int) -> dict[str, int]:
    """In how many parts a row is read, and by how many threads: of rows to 32k each keeps up to 32 values."""
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    parts = triton.cdiv(width, columns)
    return {"COLUMNS": columns, "PARTS": parts, "num_warps": 8 if parts <= 2 else 16 if parts <= 4 else 32}


def round_rows(rows_NK: torch.Tensor, factors_K: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.round_rows`; contiguous [N, K]."""
    count, width = rows_NK.shape
    assert rows_NK.is_contiguous() and (factors_K is None or factors_K.numel() == width), WHY
    out = torch.empty_like(rows_NK, dtype=torch.float8_e4m3fn)
    scales = rows_NK.new_empty((count, 1), dtype=torch.float32)
    if out.numel():
        factors = scales if factors_K is None else factors_K.contiguous()
        _round_rows[(count,)](rows_NK, factors, out, scales, width, FACTORS=factors_K is not None, **_parts(width))
    return out, scales


@triton.jit
def _round_swiglu(  # type: ignore[no-untyped-def]
    gate_up_ptr, out_ptr, scale_ptr, width, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    dtype = gate_up_ptr.dtype.element_ty
    largest = tl.zeros((COLUMNS,), dtype=tl.int32)
    kept = ()
    for part in tl.static_range(PARTS):
        at = part * COLUMNS + column
        place = gate_up_ptr + row * 2 * width + at
        gate = tl.load(place, mask=at < width, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=at < width, other=0.0).to(tl.float32)
        # To the bit what `triton_kernels.swiglu` makes.
        silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        product = (silu * up).to(dtype)
        kept = kept + (product,)  # type: ignore[assignment]
        largest = tl.maximum(largest, _magnitude(product.to(tl.float32)))
    scale, inverse = _scale(largest)
    for part in tl.static_range(PARTS):
        at = part * COLUMNS + column
        tl.store(out_ptr + row * width + at, _e4m3(kept[part].to(tl.float32) * inverse), mask=at < width)
    tl.store(scale_ptr + row, scale)


def round_swiglu(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_rows` of what `triton_kernels.swiglu` makes: contiguous [N, 2 F] -> e4m3 [N, F], float32 [N, 1]."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous(), WHY
    out = gate_up.new_empty((count, width), dtype=torch.float8_e4m3fn)
    scales = gate_up.new_empty((count, 1), dtype=torch.float32)
    if out.numel():
        _round_swiglu[(count,)](gate_up, out, scales, width, **_parts(width))
    return out, scales


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    gate_up_ptr, grad_ptr, factor_ptr, row, at, width, dtype: tl.constexpr
):
    # To the bit what `triton_kernels.swiglu_gradient_` makes, times the factors.
    inside = at < width
    place = row * 2 * width + at
    gate = tl.load(gate_up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype).to(tl.float32)
    grad_up = (grad * gate * sigmoid).to(dtype).to(tl.float32)
    grad_gate = grad_gate * tl.load(factor_ptr + at, mask=inside, other=0.0)
    grad_up = grad_up * tl.load(factor_ptr + width + at, mask=inside, other=0.0)
    return grad_gate, grad_up


@triton.jit
def _round_swiglu_gradient(  # type: ignore[no-untyped-def]
    gate_up_ptr, grad_ptr, factor_ptr, out_ptr, scale_ptr, width, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    dtype = gate_up_ptr.dtype.element_ty
    largest = tl.zeros((COLUMNS,), dtype=tl.int32)
    for part in range(PARTS):
        at = part * COLUMNS + column
        grad_gate, grad_up = _gradient(gate_up_ptr, grad_ptr, factor_ptr, row, at, width, dtype)
        largest = tl.maximum(largest, tl.maximum(_magnitude(grad_gate), _magnitude(grad_up)))
    scale, inverse = _scale(largest)
    # Made again from what the cache holds: both halves of a row do not fit in registers (docs/LOG.md).
    for part in range(PARTS):
        at = part * COLUMNS + column
        grad_gate, grad_up = _gradient(gate_up_ptr, grad_ptr, factor_ptr, row, at, width, dtype)
        place = out_ptr + row * 2 * width + at
        tl.store(place, _e4m3(grad_gate * inverse), mask=at < width)
        tl.store(place + width, _e4m3(grad_up * inverse), mask=at < width)
    tl.store(scale_ptr + row, scale)


def round_swiglu_gradient(
    gate_up: torch.Tensor, grad: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_rows`, with factors float32 [2 F], of what `triton_kernels.swiglu_gradient_` makes: e4m3 [N, 2 F].

    Args:
        gate_up: contiguous [N, 2 F].
        grad: of their product, contiguous [N, F].
    """
    count, width = grad.shape
    assert gate_up.shape == (count, 2 * width) and factors.numel() == 2 * width, WHY
    assert gate_up.is_contiguous() and grad.is_contiguous() and factors.is_contiguous(), WHY
    out = torch.empty_like(gate_up, dtype=torch.float8_e4m3fn)
    scales = gate_up.new_empty((count, 1), dtype=torch.float32)
    if out.numel():
        columns = min(_COLUMNS, triton.next_power_of_2(width))
        _round_swiglu_gradient[(count,)](
            gate_up, grad, factors, out, scales, width,
            COLUMNS=columns, PARTS=triton.cdiv(width, columns), num_warps=16,
        )  # fmt: skip
    return out, scales


@triton.jit
def _transpose(x_ptr, out_ptr, rows, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0)
    tl.store(out_ptr + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def transposed(matrix_OI: torch.Tensor) -> torch.Tensor:
    """A contiguous [O, I] of one byte a value, as contiguous [I, O]: torch's copy reads bytes far apart."""
    rows, columns = matrix_OI.shape
    assert matrix_OI.is_contiguous() and matrix_OI.element_size() == 1, WHY
    out = matrix_OI.new_empty((columns, rows))
    if out.numel():
        grid = (triton.cdiv(columns, _TILE), triton.cdiv(rows, _TILE))
        _transpose[grid](matrix_OI.view(torch.uint8), out.view(torch.uint8), rows, columns, TILE=_TILE, num_warps=8)
    return out


@triton.jit
def _dequantize_nf4(  # type: ignore[no-untyped-def]
    code_ptr, magnitude_ptr, second_ptr, values_ptr, dynamic_ptr, out_ptr, half, groups, first,
    HALF_BLOCK: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = byte < half
    codes = tl.load(code_ptr + row * half + byte, mask=inside, other=0).to(tl.int32)
    block = byte // HALF_BLOCK
    magnitude = tl.load(magnitude_ptr + row * (half // HALF_BLOCK) + block, mask=inside, other=0).to(tl.int32)
    second = second_ptr + row * (1 + groups)
    scale = tl.load(second + 1 + (first + block) // GROUP, mask=inside, other=0.0)
    largest = tl.load(dynamic_ptr + magnitude) * scale + tl.load(second)
    upper = tl.load(values_ptr + (codes >> 4)) * largest
    lower = tl.load(values_ptr + (codes & 15)) * largest
    column = tl.program_id(1) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    both = tl.interleave(upper, lower).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * 2 * half + column, both, mask=column < 2 * half)


def dequantize_nf4(
    codes: torch.Tensor,
    magnitudes: torch.Tensor,
    second: torch.Tensor,
    values: torch.Tensor,
    dynamic: torch.Tensor,
    first: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `quantized_weight.Nf4Weight.dequantized`: [O, I] in `dtype`.

    Args:
        codes, magnitudes, second: the members, contiguous.
        values: float32 [16], of the 4-bit codes.
        dynamic: float32 [256], of the 8-bit ones.
        first: number of the first block in the checkpoint's row.
    """
    rows, half = codes.shape
    assert codes.is_contiguous() and magnitudes.is_contiguous() and second.is_contiguous(), WHY
    out = torch.empty(rows, 2 * half, dtype=dtype, device=codes.device)
    if out.numel():
        size = min(_BYTES, triton.next_power_of_2(half))
        _dequantize_nf4[(rows, triton.cdiv(half, size))](
            codes, magnitudes, second, values, dynamic, out, half, second.shape[1] - 1, first,
            HALF_BLOCK=BLOCK // 2, GROUP=GROUP, BYTES=size, enable_fp_fusion=False,
        )  # fmt: skip
    return out
