"""Attention over keys in two tensors put together by its log-sum-exps, in one pass, in Triton.

Torch's operations convert both outputs to fp32, interpolate, and round: eight passes over them instead of three.

Shapes: B segments, H heads, S tokens of a segment, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    early_ptr, own_ptr, out_ptr, early_lse_ptr, own_lse_ptr, lse_ptr, heads, tokens, width,
    early_b, early_h, early_s, own_b, own_h, own_s, out_b, out_h, out_s, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    place = tl.program_id(1).to(tl.int64) * tokens + token
    early_lse = tl.load(early_lse_ptr + place, mask=inside, other=0.0)
    own_lse = tl.load(own_lse_ptr + place, mask=inside, other=0.0)
    # exp(early) / (exp(early) + exp(own))
    share = tl.sigmoid(early_lse - own_lse)
    largest = tl.maximum(early_lse, own_lse)
    total = largest + tl.log(tl.exp(early_lse - largest) + tl.exp(own_lse - largest))
    tl.store(lse_ptr + place, total, mask=inside)
    column = tl.arange(0, WIDTH)[None, :]
    both = inside[:, None] & (column < width)
    token = token.to(tl.int64)[:, None]
    early_ptr += segment * early_b + head * early_h
    own_ptr += segment * own_b + head * own_h
    early = tl.load(early_ptr + token * early_s + column, mask=both, other=0.0).to(tl.float32)
    own = tl.load(own_ptr + token * own_s + column, mask=both, other=0.0).to(tl.float32)
    merged = own + share[:, None] * (early - own)
    target = out_ptr + segment * out_b + head * out_h + token * out_s + column
    tl.store(target, merged.to(out_ptr.dtype.element_ty), mask=both)


def merge(
    early: torch.Tensor, early_lse: torch.Tensor, own: torch.Tensor, own_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(merged output, with the strides of `own`, and log-sum-exps, with the shape of `own_lse`).

    Args:
        early, own: [B, H, S, D], any strides but the last one's, which is 1.
        early_lse, own_lse: contiguous fp32 [B, H, S] or [B, H, S, 1].
    """
    batch, heads, tokens, width = own.shape
    assert early.shape == own.shape and early.stride(-1) == own.stride(-1) == 1, "other layouts go to torch"
    assert early_lse.is_contiguous() and own_lse.is_contiguous() and own_lse.numel() == batch * heads * tokens
    out, lse = torch.empty_like(own), torch.empty_like(own_lse)
    if own.numel():
        _merge[(triton.cdiv(tokens, 32), batch * heads)](
            early, own, out, early_lse, own_lse, lse, heads, tokens, width, *early.stride()[:3], *own.stride()[:3],
            *out.stride()[:3], TOKENS=32, WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip
    return out, lse
