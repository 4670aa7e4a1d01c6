"""Rotary positions of a plan as angles and tables, numerically the same as transformers'.

Shapes: S positions, B batch, H heads, D head width.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from pipeline.model.layers.kernel_choice import kernels_for
from pipeline.planning.rope import RopePlan


def _original(plan: RopePlan) -> int:
    """Original context of yarn and llama3, tokens."""
    assert plan.original_context is not None, "only linear scaling may leave it open"
    return plan.original_context


def _yarn_ramp(plan: RopePlan, head_dim: int) -> torch.Tensor:
    """Share of stretching a pair gets, fp32 [D/2]: 0 for fast pairs, 1 for slow ones (arXiv 2309.00071, section
    3.2)."""

    original = _original(plan)

    def pair_of(rotations: float) -> float:
        """Fractional pair index that turns `rotations` times over the original context."""
        turns = math.log(original / (rotations * 2 * math.pi))
        return (head_dim * turns) / (2 * math.log(plan.theta))

    low, high = pair_of(plan.beta_fast), pair_of(plan.beta_slow)
    if plan.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def inverse_frequencies(plan: RopePlan, head_dim: int) -> torch.Tensor:
    """Angle a position of every pair of channels, fp32 [D/2] on the CPU.

    Bit-equal to transformers' (operation by operation): a model trained here and run there sees the same angles. fp32
    whatever the default dtype, because bf16 would be radians off at position 32k.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    pair_periods = plan.theta**exponents
    plain = 1.0 / pair_periods
    if plan.type == "none":
        return plain
    if plan.type == "linear":
        return plain / plan.factor
    if plan.type == "yarn":
        kept = 1 - _yarn_ramp(plan, head_dim)
        return 1.0 / (plan.factor * pair_periods) * (1 - kept) + plain * kept
    wavelengths = 2 * math.pi / plain
    low, high, original = plan.low_freq_factor, plan.high_freq_factor, _original(plan)
    stretched = torch.where(wavelengths > original / low, plain / plan.factor, plain)
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * stretched / plan.factor + smooth * stretched
    between = ~(wavelengths < original / high) * ~(wavelengths > original / low)
    return torch.where(between, blended, stretched)


def rope_tables(plan: RopePlan, head_dim: int, positions_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, fp32 [S, D/2] each, on the positions' device; the attention factor is applied.

    The angle is one fp32 product, as in transformers: exact to half a unit in the last place, which at position 131072
    is 0.004 rad on the fastest pairs, the same in both programs.

    Args:
        positions_S: int64 true positions; exact in fp32 up to 2^24.
    """
    frequencies = inverse_frequencies(plan, head_dim).to(positions_S.device)
    angles = positions_S[:, None].to(torch.float32) * frequencies
    return angles.cos() * plan.attention_factor, angles.sin() * plan.attention_factor


class _Rotate(torch.autograd.Function):
    """`apply_rope` in one pass each way, by the module `triton_kernels`."""

    @staticmethod
    def forward(
        ctx: Any, x_SBHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: ModuleType
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = kernels.rotate
        return cast(torch.Tensor, kernels.rotate(x_SBHD, cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad if grad.stride(-1) == 1 else grad.contiguous(), cos, sin, -1.0), None, None, None


class _SplitAndRotate(torch.autograd.Function):
    """Queries, keys and values of the fused projection's output, the first two turned; by the module `qkv_kernels`."""

    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, groups: int, heads: int, cos: torch.Tensor, sin: torch.Tensor, kernels: Any
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.join = kernels.join_and_rotate_back
        parts: tuple[torch.Tensor, ...] = kernels.split_and_rotate(mixed, groups, heads, cos, sin)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.join(tuple(grad.contiguous() for grad in grads), cos, sin), None, None, None, None, None


def split_and_rotate(
    mixed: torch.Tensor, groups: int, heads: int, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The fused projection's output [S, B, G (R + 2) D], by groups of R query heads, a key and a value, as queries
    [S, B, G R, D], keys and values [S, B, G, D], RoPE applied; None where no kernel can serve.

    Args:
        groups, heads: G and G R.
        cos, sin: fp32 [S, D/2] from `rope_tables`.
    """
    if kernels_for(mixed, mixed, cos, sin) is None:
        return None
    from pipeline.model.layers import qkv_kernels  # imports triton, which not every machine has

    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _SplitAndRotate.apply(
        mixed, groups, heads, cos, sin, qkv_kernels
    )
    return parts


def apply_rope(x_SBHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool = True) -> torch.Tensor:
    """Rotate channel i with channel i + D/2 (Hugging Face's half-rotation order); same shape and dtype as the input.

    The tables are rounded to the input's dtype and the arithmetic runs in it, exactly as in transformers, so that bf16
    results agree bit for bit.

    Args:
        cos, sin: fp32 [S, D/2] from `rope_tables`.
        fused: use a kernel where there is one.
    """
    kernels = kernels_for(x_SBHD, cos, sin) if fused and x_SBHD.stride(-1) == 1 else None
    if kernels is not None:
        turned: torch.Tensor = _Rotate.apply(x_SBHD, cos, sin, kernels)
        return turned
    cos, sin = cos.to(x_SBHD.dtype)[:, None, None], sin.to(x_SBHD.dtype)[:, None, None]
    first, second = x_SBHD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
