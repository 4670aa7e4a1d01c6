"""SwiGLU and its gradient in one pass over memory each, in Triton; `swiglu` falls back to torch's operations.

Eager operations read and write each half several times: a tenth of a Llama layer's time on an H100.

Shapes: N tokens, F local FFN width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Columns a program: 16 bytes a thread and load, in bf16."""


@triton.jit
def _forward(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
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
def _backward(gate_up_ptr, grad_ptr, result_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
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


def forward(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, computed in fp32: contiguous [..., 2 F] -> [..., F], any float dtype up to fp32."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    if out.numel():
        _forward[_grid(width, out.numel() // width)](gate_up, out, width, BLOCK=_BLOCK)
    return out


def backward_(gate_up: torch.Tensor, grad: torch.Tensor, result: torch.Tensor) -> None:
    """Write the gradient of `gate_up` [..., 2 F] for `grad` [..., F] into `result`; all contiguous.

    Args:
        result: may be `gate_up` itself.
    """
    width = grad.shape[-1]
    if grad.numel():
        _backward[_grid(width, grad.numel() // width)](gate_up, grad, result, width, BLOCK=_BLOCK)
