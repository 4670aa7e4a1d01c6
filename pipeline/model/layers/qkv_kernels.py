"""The fused projection's output cut into queries, keys and values with RoPE applied, in one pass, in Triton.

megatron's own way copies the queries of a grouped projection, turns them, turns the keys, copies the values, and in the
backward joins all three again: five passes more over a tenth of a layer's activations.

Shapes: S tokens, B batch, G groups of R query heads, a key and a value, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.model.layers.triton_kernels import WHY

_BLOCK = 1024
"""Values a program."""


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    x_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, batch, groups, ratio, half, sign, BACK: tl.constexpr,
    SLOTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row // batch
    slot = (tl.program_id(1) * SLOTS + tl.arange(0, SLOTS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    group, place = slot // (ratio + 2), slot % (ratio + 2)
    inside = (slot < groups * (ratio + 2)) & (column < half)
    width = 2 * half
    whole = x_ptr + (row * groups * (ratio + 2) + slot) * width + column
    q = q_ptr + (row * groups * ratio + group * ratio + place) * width + column
    k = k_ptr + (row * groups + group) * width + column
    v = v_ptr + (row * groups + group) * width + column
    is_q, is_k, is_v = inside & (place < ratio), inside & (place == ratio), inside & (place == ratio + 1)
    dtype = x_ptr.dtype.element_ty
    if BACK:
        first = tl.load(q, mask=is_q, other=0.0) + tl.load(k, mask=is_k, other=0.0) + tl.load(v, mask=is_v, other=0.0)
        second = (
            tl.load(q + half, mask=is_q, other=0.0)
            + tl.load(k + half, mask=is_k, other=0.0)
            + tl.load(v + half, mask=is_v, other=0.0)
        )
    else:
        first = tl.load(whole, mask=inside)
        second = tl.load(whole + half, mask=inside)
    first, second = first.to(tl.float32), second.to(tl.float32)
    # Every value is rounded where the eager operations round it.
    cos = tl.load(cos_ptr + token * half + column, mask=column < half).to(dtype).to(tl.float32)
    sin = tl.load(sin_ptr + token * half + column, mask=column < half).to(dtype).to(tl.float32) * sign
    left = ((first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)).to(dtype)
    right = ((second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)).to(dtype)
    left = tl.where(place == ratio + 1, first.to(dtype), left)
    right = tl.where(place == ratio + 1, second.to(dtype), right)
    if BACK:
        tl.store(whole, left, mask=inside)
        tl.store(whole + half, right, mask=inside)
    else:
        tl.store(q, left, mask=is_q)
        tl.store(q + half, right, mask=is_q)
        tl.store(k, left, mask=is_k)
        tl.store(k + half, right, mask=is_k)
        tl.store(v, left, mask=is_v)
        tl.store(v + half, right, mask=is_v)


def _launch(
    x: torch.Tensor, parts: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor, sign: float, back: bool
) -> None:
    q, k, v = parts
    tokens, batch, heads, width = q.shape
    groups = k.shape[2]
    ratio = heads // groups
    assert k.shape == v.shape == (tokens, batch, groups, width) and x.numel() == q.numel() + 2 * k.numel(), WHY
    assert cos.shape == sin.shape == (tokens, width // 2), WHY
    assert all(tensor.is_contiguous() for tensor in (x, *parts, cos, sin)), WHY
    if x.numel():
        half = triton.next_power_of_2(width // 2)
        slots = min(triton.next_power_of_2(groups * (ratio + 2)), max(1, _BLOCK // half))
        _split[(tokens * batch, triton.cdiv(groups * (ratio + 2), slots))](
            x, q, k, v, cos, sin, batch, groups, ratio, width // 2, sign, BACK=back, SLOTS=slots, HALF=half,
            enable_fp_fusion=False,
        )  # fmt: skip


def split_and_rotate(
    mixed: torch.Tensor, groups: int, heads: int, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous [S, B, G (R + 2) D] -> queries [S, B, G R, D], keys and values [S, B, G, D], the first two turned.

    The same bits as `rotary.apply_rope` of the parts.

    Args:
        groups, heads: G and G R.
        cos, sin: contiguous fp32 [S, D/2].
    """
    width = 2 * cos.shape[1]
    shape = mixed.shape[:2]
    q = mixed.new_empty((*shape, heads, width))
    k, v = (mixed.new_empty((*shape, groups, width)) for _ in range(2))
    _launch(mixed, (q, k, v), cos, sin, 1.0, False)
    return q, k, v


def join_and_rotate_back(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient [S, B, G (R + 2) D] of `split_and_rotate`'s input; contiguous ones of its outputs."""
    q, k, v = grads
    mixed = q.new_empty((*q.shape[:2], (q.shape[2] + 2 * k.shape[2]) * q.shape[3]))
    _launch(mixed, grads, cos, sin, -1.0, True)
    return mixed
