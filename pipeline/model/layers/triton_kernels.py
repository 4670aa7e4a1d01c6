"""Work of a layer that memory bounds in one pass over it, in Triton: SwiGLU, RoPE, LoRA's update, norms.

Eager operations read and write the same tensors several times: on an H100 SwiGLU's took a tenth of a Llama layer's
time, RoPE's a twenty-fifth. `kernel_choice.kernels_for` says where these can serve.

Shapes: S tokens, B batch, F local FFN width, H local heads, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Columns a program: 16 bytes a thread and load, in bf16."""
WHY = "a kernel reads and writes wherever it is told to"


def probe(device: torch.device) -> None:
    """Build every kernel and run it on a few bf16 numbers; raises whatever a machine lacks for that."""
    x = torch.ones(2, 16, device=device, dtype=torch.bfloat16)
    half = swiglu(x)
    swiglu_gradient_(x, half, x.clone())
    angles = torch.ones(1, 8, device=device)
    rotate(x.view(1, 1, 2, 16), angles, angles)
    add_update_(x.clone(), half, x.new_ones(16, 8), 1.0)
    norm_gradient(x, x[0], norm(x, x[0], 1e-5), 1e-5)
    norm_of_sum(x, x, x[0], 1e-5)


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_ptr = gate_up_ptr + row * 2 * width + columns
    gate = tl.load(gate_ptr, mask=inside).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=inside).to(tl.float32)
    # Rounded as torch rounds silu's output, so that it seldom differs from transformers in even one bit.
    silu = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient(gate_up_ptr, grad_ptr, result_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = row * 2 * width + columns
    gate = tl.load(gate_up_ptr + place, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + place + width, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + columns, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * gate * sigmoid
    # Only this program reads these elements, and it has: the result may lie over the input.
    tl.store(result_ptr + place, grad_gate.to(result_ptr.dtype.element_ty), mask=inside)
    tl.store(result_ptr + place + width, grad_up.to(result_ptr.dtype.element_ty), mask=inside)


def _grid(width: int, rows: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _BLOCK)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, computed in fp32: contiguous [..., 2 F] -> [..., F], any float dtype up to fp32."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    if out.numel():
        _swiglu[_grid(width, out.numel() // width)](gate_up, out, width, BLOCK=_BLOCK)
    return out


def swiglu_gradient_(gate_up: torch.Tensor, grad: torch.Tensor, result: torch.Tensor) -> None:
    """Write the gradient of `gate_up` [..., 2 F] for `grad` [..., F] into `result`; all contiguous.

    Args:
        result: may be `gate_up` itself.
    """
    width = grad.shape[-1]
    assert gate_up.shape == result.shape == (*grad.shape[:-1], 2 * width), WHY
    if grad.numel():
        _swiglu_gradient[_grid(width, grad.numel() // width)](gate_up, grad, result, width, BLOCK=_BLOCK)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x_ptr, cos_ptr, sin_ptr, out_ptr, batch, heads, stride_s, stride_b, stride_h, half, sign, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row // batch
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    source = x_ptr + token * stride_s + (row % batch) * stride_b + head * stride_h + column
    target = out_ptr + (row * heads + head) * 2 * half + column
    # Every value is rounded where the eager operations round it.
    dtype = out_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + token * half + column, mask=column < half).to(dtype).to(tl.float32)
    sin = tl.load(sin_ptr + token * half + column, mask=column < half).to(dtype).to(tl.float32) * sign
    first = tl.load(source, mask=inside).to(tl.float32)
    second = tl.load(source + half, mask=inside).to(tl.float32)
    turned = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    tl.store(target, turned.to(dtype), mask=inside)
    turned = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    tl.store(target + half, turned.to(dtype), mask=inside)


def rotate(x_SBHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    """Turn channel i with channel i + D/2 by the tables' angles, times `sign`: contiguous [S, B, H, D].

    The same bits as `rotary.apply_rope`'s eager operations.

    Args:
        x_SBHD: any strides but the last one's, which is 1; any float dtype up to fp32.
        cos, sin: contiguous fp32 [S, D/2].
        sign: 1, or -1 for the gradient.
    """
    tokens, batch, heads, width = x_SBHD.shape
    assert cos.shape == sin.shape == (tokens, width // 2), WHY
    out = x_SBHD.new_empty(x_SBHD.shape)
    if out.numel():
        half = triton.next_power_of_2(width // 2)
        block = min(triton.next_power_of_2(heads), max(1, _BLOCK // half))
        _rotate[(tokens * batch, triton.cdiv(heads, block))](
            x_SBHD, cos, sin, out, batch, heads, *x_SBHD.stride()[:3], width // 2, sign, HEADS=block, HALF=half,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _add_update(  # type: ignore[no-untyped-def]
    base_ptr, low_ptr, b_ptr, rows, columns, rank, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, RANK)
    low = tl.load(
        low_ptr + row.to(tl.int64) * rank + part[None, :], mask=(row < rows) & (part < rank)[None, :], other=0.0
    )
    b = tl.load(
        b_ptr + column[None, :] * rank + part[:, None],
        mask=(column < columns)[None, :] & (part < rank)[:, None],
        other=0.0,
    )
    update = tl.dot(low, b)
    place = base_ptr + row.to(tl.int64) * columns + column[None, :]
    inside = (row < rows) & (column < columns)[None, :]
    total = tl.load(place, mask=inside).to(tl.float32) + scale * update
    tl.store(place, total.to(base_ptr.dtype.element_ty), mask=inside)


def add_update_(base: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add scale * low b^T to `base`, rounded once: [N, O] += [N, R] [O, R]^T; contiguous, bf16 or fp16, R up to 128."""
    (rows, columns), rank = base.shape, low.shape[1]
    assert low.shape == (rows, rank) and b.shape == (columns, rank) and base.dtype == low.dtype == b.dtype, WHY
    if base.numel():
        _add_update[(triton.cdiv(rows, 64), triton.cdiv(columns, 128))](
            base, low, b, rows, columns, rank, scale, ROWS=64, COLUMNS=128, RANK=max(16, triton.next_power_of_2(rank))
        )


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, width, eps, SUM: tl.constexpr, WIDTH: tl.constexpr
):
    column = tl.arange(0, WIDTH)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if SUM:
        total = x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = weight * (x * tl.rsqrt(tl.sum(x * x) / width + eps))
    tl.store(out_ptr + place, normed.to(out_ptr.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm [..., H] of the last dimension, computed in fp32 and rounded once; contiguous, in the dtype of `x`.

    A row's bits do not depend on other rows.
    """
    return _normed(x, None, weight_H, eps)[1]


def norm_of_sum(
    x: torch.Tensor, residual: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual, rounded; what `norm` makes of it), of contiguous [..., H] of one dtype."""
    return _normed(x, residual, weight_H, eps)


def _normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    assert x.is_contiguous() and weight_H.shape == (width,), WHY
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous()), WHY
    total, out = x if residual is None else torch.empty_like(x), torch.empty_like(x)
    if out.numel():
        _norm[(out.numel() // width,)](
            x, total if residual is None else residual, weight_H, total, out, width, eps, SUM=residual is not None,
            WIDTH=triton.next_power_of_2(width), num_warps=16,
        )  # fmt: skip
    return total, out


@triton.jit
def _norm_gradient(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, grad_ptr, stream_ptr, result_ptr, sums_ptr, rows, width, eps, STREAM: tl.constexpr,
    EACH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    first = tl.program_id(0) * EACH
    place = first.to(tl.int64) * width + column
    here = inside & (first < rows)
    x_next = tl.load(x_ptr + place, mask=here, other=0.0)
    grad_next = tl.load(grad_ptr + place, mask=here, other=0.0)
    stream_next = tl.load(stream_ptr + place, mask=here, other=0.0) if STREAM else x_next
    for number in range(EACH):
        x, grad, stream = x_next.to(tl.float32), grad_next.to(tl.float32), stream_next.to(tl.float32)
        # The next row is on its way while this one is summed.
        follows = inside & (first + number + 1 < rows) & (number + 1 < EACH)
        x_next = tl.load(x_ptr + place + width, mask=follows, other=0.0)
        grad_next = tl.load(grad_ptr + place + width, mask=follows, other=0.0)
        stream_next = tl.load(stream_ptr + place + width, mask=follows, other=0.0) if STREAM else x_next
        scale = tl.rsqrt(tl.sum(x * x) / width + eps)
        x = x * scale
        total += grad * x
        grad = grad * weight
        result = scale * (grad - x * (tl.sum(grad * x) / width))
        if STREAM:
            result += stream
        tl.store(result_ptr + place, result.to(result_ptr.dtype.element_ty), mask=inside & (first + number < rows))
        place += width
    tl.store(sums_ptr + tl.program_id(0) * width + column, total, mask=inside)


def norm_gradient(
    x: torch.Tensor, weight_H: torch.Tensor, grad: torch.Tensor, eps: float, stream: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of RMSNorm's input [..., H] and weight [H], in their dtypes, sums in fp32; all contiguous.

    The root mean square is computed again from the input: nothing is kept for it.

    Args:
        stream: another gradient of the input [..., H], which is added before the sum is rounded.
    """
    width = x.shape[-1]
    assert grad.shape == x.shape and weight_H.shape == (width,), WHY
    assert stream is None or (stream.shape == x.shape and stream.is_contiguous()), WHY
    rows = x.numel() // width
    # Each program goes through many rows and holds a sum of the weight's gradient, which are added last. Powers of two:
    # the kernel is compiled for each number.
    programs = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    each = triton.next_power_of_2(max(1, triton.cdiv(rows, programs)))
    programs = triton.cdiv(rows, each)
    result, sums = torch.empty_like(x), x.new_empty((programs, width), dtype=torch.float32)
    if rows:
        _norm_gradient[(programs,)](
            x, weight_H, grad, x if stream is None else stream, result, sums, rows, width, eps,
            STREAM=stream is not None, EACH=each, WIDTH=triton.next_power_of_2(width), num_warps=16,
        )  # fmt: skip
    return result, sums.sum(dim=0).to(weight_H.dtype)
