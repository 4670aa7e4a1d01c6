"""Frozen matrices in 8 and in 4 bits: `Fp8Weight` and `Nf4Weight`; linears that keep theirs so: `quantized_linear`.

Both quantize a row of the checkpoint from that row alone, and from all of it: any stretch of rows can be made from
those rows of a checkpoint, and a tensor-parallel rank that has some of the columns rounds them as one that has them
all. So the numbers are the same on every grid.

FP8 (e4m3): one float32 scale a row. The activations are quantized too, one scale a token. The backward product g W
contracts over the rows of W, whose scales cannot be taken out of that sum; they are multiplied into g before g is
quantized, so that one copy of the matrix serves both products.

NF4 (QLoRA, arXiv 2305.14314): 4-bit codes of blocks of 64 columns, and the blocks' largest magnitudes in 8 bits. As
bitsandbytes does it, given one row at a time; bitsandbytes given a whole matrix lets these groups run across rows.

Shapes: O output width, I input width that a rank has of the checkpoint's W, R rows of the matrix, B = I / 64 blocks of
a rank's row, G = ceil(W / 64 / 256) groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch.nn import Parameter

from parallel.errors import ConfigError
from pipeline.model.layers.fp8 import Rounded, round_rows, transposed
from pipeline.model.layers.fp8_swiglu import round_swiglu, round_swiglu_gradient
from pipeline.model.layers.frozen_weight import DenseWeight, FrozenWeight, times
from pipeline.model.layers.kernel_choice import kernels_for
from pipeline.planning.base_form import BLOCK, GROUP

AT_ONCE = 1 << 24
"""Values: bounds the float32 copies beside a matrix that is encoded or decoded."""

# The quantiles of a normal distribution that QLoRA's appendix E lists.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class _Quantized(FrozenWeight):
    """What both forms share.

    Args:
        members: in the order of `members()`.
        columns: [start, stop) of the checkpoint's columns that this rank has.
        width: the checkpoint's columns W.
        fused: use kernels.
    """

    whole_rows = True

    def __init__(self, members: Sequence[Parameter], columns: tuple[int, int], width: int, fused: bool = True) -> None:
        self._members, self.columns, self.width, self.fused = tuple(members), columns, width, fused

    @property
    def given_shape(self) -> torch.Size:
        """See `FrozenWeight.given_shape`."""
        return torch.Size((*self.shape[:1], self.width))

    @abstractmethod
    def _encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """See `FrozenWeight.encode`, of no more than `rows_at_once` rows: it may have wide copies of them."""

    def encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """See `FrozenWeight.encode`; whole rows [R, W], some at a time."""
        parts = [self._encode(part) for part in rows_RI.split(rows_at_once(self.width))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def write(self, whole_OI: torch.Tensor) -> None:
        """See `FrozenWeight.write`; encoded where the members lie, some rows at a time."""
        members = self.members()
        rows = rows_at_once(self.width)
        for start in range(0, len(whole_OI), rows):
            part = whole_OI[start : start + rows].to(next(iter(members.values())).device)
            for name, found in self._encode(part).items():
                members[name][start : start + rows].copy_(found)


def rows_at_once(width: int) -> int:
    """Rows of `width` columns that are encoded or decoded at a time."""
    return max(1, AT_ONCE // width)


class Fp8Weight(_Quantized):
    """weight: e4m3 [O, I]; scales: float32 [O, 1], of whole rows of the checkpoint."""

    form = "fp8"
    rounds = True

    def __init__(self, members: Sequence[Parameter], columns: tuple[int, int], width: int, fused: bool = True) -> None:
        super().__init__(members, columns, width, fused)
        self._holds, self._transposed = False, cast(torch.Tensor | None, None)

    @property
    def weight(self) -> Parameter:
        """e4m3 [O, I]."""
        return self._members[0]

    @property
    def scales(self) -> Parameter:
        """float32 [O, 1]."""
        return self._members[1]

    @property
    def shape(self) -> torch.Size:
        """See `FrozenWeight.shape`."""
        return self.weight.shape

    def members(self) -> Mapping[str, Parameter]:
        """The e4m3 matrix and its scales."""
        return {"weight": self.weight, "scales": self.scales}

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I]."""
        return (self.weight.detach().float() * self.scales.detach()).to(dtype)

    def _encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """e4m3 [R, I] and float32 [R, 1] of whole rows [R, W]."""
        weight, scales = round_rows(rows_RI, fused=self.fused)
        return {"weight": weight[:, slice(*self.columns)], "scales": scales}

    def product(self, rows: torch.Tensor | Rounded, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.product`; `rows` are quantized, one scale each."""
        if not isinstance(rows, Rounded):
            rows = Rounded.of(rows, fused=self.fused)
        return _times(rows, self.weight.detach(), self.scales.detach().t().contiguous(), out)

    def swiglu(self, gate_up: torch.Tensor, fused: bool = True) -> Rounded:
        """See `FrozenWeight.swiglu`: quantized as it is made."""
        return round_swiglu(gate_up, fused and self.fused)

    def at_hand(self, dtype: torch.dtype) -> FrozenWeight:
        """See `FrozenWeight.at_hand`: it is transposed once for all gradients."""
        held = Fp8Weight(self._members, self.columns, self.width, self.fused)
        held._holds = True
        return held

    def grad_input(self, grads: torch.Tensor | Rounded, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.grad_input`; `grads` times the matrix's scales are quantized, one scale a row."""
        if not isinstance(grads, Rounded):
            grads = Rounded.of(grads, self.scales.detach().flatten(), self.fused)
        matrix_IO = self._transposed
        if matrix_IO is None:
            # FP8 products on Hopper read both factors along the contracted dimension.
            matrix_IO = transposed(self.weight.detach(), self.fused)
            self._transposed = matrix_IO if self._holds else None
        return _times(grads, matrix_IO, self.scales.new_ones(1, len(matrix_IO)), out)

    def swiglu_gradient(self, gate_up: torch.Tensor, grads: torch.Tensor, fused: bool = True) -> Rounded:
        """See `FrozenWeight.swiglu_gradient`: quantized as it is made."""
        return round_swiglu_gradient(gate_up, grads, self.scales.detach().flatten(), fused and self.fused)


def _times(rows: Rounded, matrix_MK: torch.Tensor, scales_1M: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Rows times the transposed matrix, times the columns' scales: [..., M] in the dtype the rows had."""
    values = rows.values
    if values.is_cuda:
        factors = values, matrix_MK.t(), rows.scales, scales_1M
        options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        if out is not None and out.dtype is torch.bfloat16 and out.is_contiguous():
            torch._scaled_mm(*factors, **options, out=out.view(len(values), -1))
            return out
        found = torch._scaled_mm(*factors, **options).to(rows.dtype)
    else:
        # No dtype narrower than the rows': a test's float64 stays one.
        wide = torch.promote_types(rows.dtype, torch.float32)
        found = (values.to(wide) @ matrix_MK.to(wide).t() * rows.scales * scales_1M).to(rows.dtype)
    if out is None:
        return found.view(*rows.leading, -1)
    return out.copy_(found.view(out.shape))


@cache
def _nf4_code(device: torch.device) -> torch.Tensor:
    """NF4_CODE, float32 [16]."""
    return torch.tensor(NF4_CODE, device=device)


@cache
def _dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values of signed 8-bit dynamic quantization (arXiv 2110.02861), ascending, float32."""
    magnitudes: list[float] = []
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        magnitudes += (10.0 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2).tolist()
    return torch.tensor(sorted([*magnitudes, *(-value for value in magnitudes), 0.0, 1.0]), device=device)


def _nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of ascending values; between two, the lower."""
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2).to(torch.uint8)


class Nf4Weight(_Quantized):
    """weight: uint8 [O, I / 2]; of two codes the first is in the upper half.

    magnitudes: uint8 [O, B], the blocks' largest magnitudes less the row's mean of them, in 8-bit dynamic codes.
    second: float32 [O, 1 + G]: the row's mean, then every group's scale; of whole rows of the checkpoint.
    """

    form = "nf4"

    @property
    def weight(self) -> Parameter:
        """uint8 [O, I / 2]."""
        return self._members[0]

    @property
    def shape(self) -> torch.Size:
        """See `FrozenWeight.shape`."""
        if self.weight.ndim < 2:
            return self.weight.shape
        return torch.Size((self.weight.shape[0], 2 * self.weight.shape[1]))

    def members(self) -> Mapping[str, Parameter]:
        """The codes, and two levels of scales."""
        return dict(zip(("weight", "magnitudes", "second"), self._members, strict=True))

    def _encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """See the members; of whole rows [R, W]."""
        rows = len(rows_RI)
        blocks = rows_RI.float().view(rows, -1, BLOCK)
        largest = blocks.abs().amax(dim=-1)
        codes = _nearest(blocks * (1.0 / largest.clamp_min(1e-38)).unsqueeze(-1), _nf4_code(rows_RI.device)).view(
            rows, -1, 2
        )
        mean = largest.mean(dim=1, keepdim=True)
        rest = largest - mean
        scales = torch.cat([part.abs().amax(dim=1, keepdim=True) for part in rest.split(GROUP, dim=1)], dim=1)
        scaled = rest * (1.0 / scales.clamp_min(1e-38)).repeat_interleave(GROUP, dim=1)[:, : rest.shape[1]]
        first, last = self.columns
        return {
            "weight": (codes[..., 0] << 4 | codes[..., 1])[:, first // 2 : last // 2],
            "magnitudes": _nearest(scaled, _dynamic_code(rows_RI.device))[:, first // BLOCK : last // BLOCK],
            "second": torch.cat([mean, scales], dim=1),
        }

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I]."""
        weight, magnitudes, second = (member.detach() for member in self._members)
        first = self.columns[0] // BLOCK
        if self.fused and kernels_for(second, weight, magnitudes, second) is not None:
            from pipeline.model.layers import quantize_kernels  # imports triton, which not every machine has

            tables = _nf4_code(weight.device), _dynamic_code(weight.device)
            made: torch.Tensor = quantize_kernels.dequantize_nf4(weight, magnitudes, second, *tables, first, dtype)
            return made
        code = _nf4_code(weight.device)
        # Both values of a byte at once: [256, 2].
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
        dynamic = _dynamic_code(weight.device)
        whole = torch.empty(self.shape, dtype=dtype, device=weight.device)
        rows, blocks = rows_at_once(whole.shape[1]), slice(first, self.columns[1] // BLOCK)
        for start in range(0, len(whole), rows):
            part = slice(start, start + rows)
            groups = second[part, 1:].repeat_interleave(GROUP, dim=1)[:, blocks]
            largest = dynamic[magnitudes[part].int()] * groups + second[part, :1]
            values = pairs[weight[part].int()].view(*largest.shape, BLOCK) * largest.unsqueeze(-1)
            whole[part] = values.flatten(1)
        return whole

    def at_hand(self, dtype: torch.dtype) -> FrozenWeight:
        """See `FrozenWeight.at_hand`: the dequantized matrix."""
        return DenseWeight(Parameter(self.dequantized(dtype), requires_grad=False))

    def product(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.product`; in the dtype of `rows`."""
        return times(rows, self.dequantized(rows.dtype).t(), out)

    def grad_input(self, grads: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.grad_input`; in the dtype of `grads`."""
        return times(grads, self.dequantized(grads.dtype), out)


def _member_shapes(form: str, columns: int, width: int) -> dict[str, tuple[int, torch.dtype]]:
    """Columns and dtype of every member of a matrix of which a rank has `columns` of `width` columns."""
    if form == Fp8Weight.form:
        return {"weight": (columns, torch.float8_e4m3fn), "scales": (1, torch.float32)}
    groups = -(-(width // BLOCK) // GROUP)
    return {
        "weight": (columns // 2, torch.uint8),
        "magnitudes": (columns // BLOCK, torch.uint8),
        "second": (1 + groups, torch.float32),
    }


FORMS: dict[str, type[Fp8Weight | Nf4Weight]] = {Fp8Weight.form: Fp8Weight, Nf4Weight.form: Nf4Weight}
"""By name, as model.base spells it."""


def empty(
    form: str, shape: tuple[int, int], device: torch.device | str, part: tuple[int, int] | None = None
) -> Fp8Weight | Nf4Weight:
    """A matrix of form `fp8` or `nf4`, its members allocated and unset.

    Args:
        shape: of the checkpoint's rows, [O, W].
        part: [start, stop) of the columns it is to have; None: all.

    Raises:
        ConfigError: these columns are no whole number of blocks.
    """
    rows, width = shape
    first, last = part or (0, width)
    if form == Nf4Weight.form and ((last - first) % BLOCK or first % BLOCK or width % BLOCK):
        raise ConfigError(
            f"model.base: nf4 cuts rows into blocks of {BLOCK}, but a rank has {last - first} of {width} columns of a "
            "matrix; use a smaller parallel.tp, or model.base: fp8."
        )
    members = [
        Parameter(torch.empty(rows, size, dtype=dtype, device=device), requires_grad=False)
        for size, dtype in _member_shapes(form, last - first, width).values()
    ]
    return FORMS[form](members, (first, last), width)


def dequantized(form: str, matrix_OI: torch.Tensor) -> torch.Tensor:
    """A checkpoint's matrix as a form rounds it, float32 [O, I]: what products are made with but for FP8's rounding of
    activations."""
    weight = empty(form, (matrix_OI.shape[0], matrix_OI.shape[1]), matrix_OI.device)
    weight.write(matrix_OI)
    return weight.dequantized(torch.float32)
