"""Frozen matrices in 8 and in 4 bits: `Fp8Weight` and `Nf4Weight`.

Both quantize a row from that row alone, so that any stretch of rows can be made from those rows of a checkpoint.

FP8 (e4m3): one float32 scale a row. The activations are quantized too, one scale a token. The backward product g W
contracts over the rows of W, whose scales cannot be taken out of that sum; they are multiplied into g before g is
quantized, so that one copy of the matrix serves both products.

NF4 (QLoRA, arXiv 2305.14314): 4-bit codes of blocks of 64 columns, and the blocks' largest magnitudes in 8 bits. As
bitsandbytes does it, given one row at a time; bitsandbytes given a whole matrix lets these groups run across rows.

Shapes: O output width, I input width, R rows of the matrix, B = I / 64 blocks of a row, G = ceil(B / 256) groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch.nn import Parameter

from parallel.errors import ConfigError
from pipeline.model.layers.frozen_weight import FrozenWeight, times

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 64
"""Columns that share a largest magnitude in NF4."""
GROUP = 256
"""Blocks that share a scale of their 8-bit magnitudes."""
DEQUANTIZED_AT_ONCE = 1 << 24
"""Values: bounds the float32 copies beside a dequantized matrix."""

# The quantiles of a normal distribution that QLoRA's appendix E lists.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, K] of any float dtype -> e4m3 [n, K] and float32 scales [n, 1]; their product is the rows again."""
    values = rows.float()
    scales = (values.abs().amax(dim=1, keepdim=True) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


class Fp8Weight(FrozenWeight):
    """Args:
    weight: e4m3 [O, I].
    scales: float32 [O, 1].
    """

    form = "fp8"

    def __init__(self, weight: Parameter, scales: Parameter) -> None:
        self.weight, self.scales = weight, scales

    @property
    def shape(self) -> torch.Size:
        """See `FrozenWeight.shape`."""
        return self.weight.shape

    def members(self) -> Mapping[str, Parameter]:
        """The e4m3 matrix and its scales."""
        return {"weight": self.weight, "scales": self.scales}

    def encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """e4m3 [R, I] and float32 [R, 1]."""
        weight, scales = quantize_rows(rows_RI)
        return {"weight": weight, "scales": scales}

    def product(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.product`; `rows` are quantized, one scale each."""
        return _fp8_times(rows, rows.flatten(0, -2), self.weight.detach(), self.scales.detach().t(), out)

    def grad_input(self, grads: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.grad_input`; `grads` times the matrix's scales are quantized, one scale a row."""
        scaled = grads.flatten(0, -2).float() * self.scales.detach().t()
        # FP8 products on Hopper read both factors along the contracted dimension: the matrix is turned for each.
        turned = self.weight.detach().t().contiguous()
        return _fp8_times(grads, scaled, turned, torch.ones_like(scaled[:1, :1]).expand(1, len(turned)), out)


def _fp8_times(
    like: torch.Tensor,
    rows_NK: torch.Tensor,
    matrix_MK: torch.Tensor,
    scales_1M: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """rows times the transposed matrix, [..., M] in the dtype and leading shape of `like`."""
    quantized, scales_N1 = quantize_rows(rows_NK)
    if quantized.is_cuda:
        found = torch._scaled_mm(
            quantized, matrix_MK.t(), scales_N1, scales_1M.contiguous(), out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(like.dtype)
    else:
        found = (quantized.float() @ matrix_MK.float().t() * scales_N1 * scales_1M).to(like.dtype)
    if out is None:
        return found.view(*like.shape[:-1], -1)
    return out.copy_(found.view(out.shape))


@cache
def _dynamic_code() -> torch.Tensor:
    """The 256 values of signed 8-bit dynamic quantization (arXiv 2110.02861), ascending, float32."""
    magnitudes: list[float] = []
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        magnitudes += (10.0 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2).tolist()
    return torch.tensor(sorted([*magnitudes, *(-value for value in magnitudes), 0.0, 1.0]))


def _nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of ascending values; between two, the lower."""
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2).to(torch.uint8)


class Nf4Weight(FrozenWeight):
    """Args:
    weight: uint8 [O, I / 2]; of two codes the first is in the upper half.
    magnitudes: uint8 [O, B], the blocks' largest magnitudes less the row's mean of them, in 8-bit dynamic codes.
    second: float32 [O, 1 + G]: the row's mean, then every group's scale.
    """

    form = "nf4"

    def __init__(self, weight: Parameter, magnitudes: Parameter, second: Parameter) -> None:
        self.weight, self.magnitudes, self.second = weight, magnitudes, second

    @property
    def shape(self) -> torch.Size:
        """See `FrozenWeight.shape`."""
        if self.weight.ndim < 2:
            return self.weight.shape
        return torch.Size((self.weight.shape[0], 2 * self.weight.shape[1]))

    def members(self) -> Mapping[str, Parameter]:
        """The codes, and two levels of scales."""
        return {"weight": self.weight, "magnitudes": self.magnitudes, "second": self.second}

    def encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """See the members.

        Raises:
            ConfigError: a row is no whole number of blocks.
        """
        rows, width = rows_RI.shape
        if width % BLOCK:
            raise ConfigError(
                f"NF4 cuts rows into blocks of {BLOCK}, but a rank has {width} columns of a matrix; use a smaller "
                "parallel.tp."
            )
        blocks = rows_RI.float().view(rows, -1, BLOCK)
        largest = blocks.abs().amax(dim=-1)
        codes = _nearest(
            blocks * (1.0 / largest.clamp_min(1e-38)).unsqueeze(-1), torch.tensor(NF4_CODE, device=rows_RI.device)
        ).view(rows, -1, 2)
        mean = largest.mean(dim=1, keepdim=True)
        rest = largest - mean
        scales = torch.cat([part.abs().amax(dim=1, keepdim=True) for part in rest.split(GROUP, dim=1)], dim=1)
        scaled = rest * (1.0 / scales.clamp_min(1e-38)).repeat_interleave(GROUP, dim=1)[:, : rest.shape[1]]
        return {
            "weight": codes[..., 0] << 4 | codes[..., 1],
            "magnitudes": _nearest(scaled, _dynamic_code().to(rows_RI.device)),
            "second": torch.cat([mean, scales], dim=1),
        }

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I]."""
        weight, magnitudes, second = self.weight.detach(), self.magnitudes.detach(), self.second.detach()
        code = torch.tensor(NF4_CODE, device=weight.device)
        # Both values of a byte at once: [256, 2].
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
        dynamic = _dynamic_code().to(weight.device)
        whole = torch.empty(self.shape, dtype=dtype, device=weight.device)
        rows = max(1, DEQUANTIZED_AT_ONCE // whole.shape[1])
        for start in range(0, len(whole), rows):
            part = slice(start, start + rows)
            groups = second[part, 1:].repeat_interleave(GROUP, dim=1)[:, : magnitudes.shape[1]]
            largest = dynamic[magnitudes[part].int()] * groups + second[part, :1]
            values = pairs[weight[part].int()].view(*largest.shape, BLOCK) * largest.unsqueeze(-1)
            whole[part] = values.flatten(1)
        return whole

    def product(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.product`; in the dtype of `rows`."""
        return times(rows, self.dequantized(rows.dtype).t(), out)

    def grad_input(self, grads: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.grad_input`; in the dtype of `grads`."""
        return times(grads, self.dequantized(grads.dtype), out)


def empty(form: str, shape: tuple[int, int], device: torch.device | str) -> FrozenWeight:
    """A matrix [O, I] of form `fp8` or `nf4`, its members allocated and unset."""

    def member(width: int, dtype: torch.dtype) -> Parameter:
        return Parameter(torch.empty(shape[0], width, dtype=dtype, device=device), requires_grad=False)

    if form == Fp8Weight.form:
        return Fp8Weight(member(shape[1], torch.float8_e4m3fn), member(1, torch.float32))
    blocks = shape[1] // BLOCK
    return Nf4Weight(
        member(shape[1] // 2, torch.uint8), member(blocks, torch.uint8), member(1 - (-blocks // GROUP), torch.float32)
    )
