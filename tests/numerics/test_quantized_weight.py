"""Matrices in 8 and 4 bits: their numbers against bitsandbytes and fp64, and the two products on a CPU and a GPU."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from parallel.errors import ConfigError
from pipeline.model.layers import quantized_weight
from pipeline.model.layers.fp8 import round_rows
from pipeline.model.layers.frozen_weight import FrozenWeight
from pipeline.model.layers.quantized_weight import Nf4Weight, empty
from tests.support.interpreted import interpret

# Relative Frobenius errors on normal data, with a quarter above what was measured (0.0267 a factor; NF4 0.092).
FP8_PRODUCT = 0.047
NF4_MATRIX = 0.115


def made(form: str, matrix: torch.Tensor) -> FrozenWeight:
    weight = empty(form, (matrix.shape[0], matrix.shape[1]), matrix.device)
    weight.write(matrix)
    return weight


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


# 320: less than a group of blocks; 16448: one block more than a group.
@pytest.mark.parametrize("columns", [320, 16448])
def test_nf4_is_what_bitsandbytes_makes_of_each_row(columns: int) -> None:
    """bitsandbytes 0.50.2, each row alone: `dequantize_4bit(*quantize_4bit(row.float(), blocksize=64, quant_type="nf4",
    compress_statistics=True))` of the first lines' matrix, on a CPU; kept in nf4_bitsandbytes.npz."""
    theirs = np.load(Path(__file__).with_name("nf4_bitsandbytes.npz"))[f"columns_{columns}"]
    matrix = torch.randn(2, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix[:, 5] = 9.0
    weight = made("nf4", matrix)
    assert isinstance(weight, Nf4Weight)
    found = weight.dequantized(torch.float32)
    torch.testing.assert_close(found, torch.from_numpy(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_a_stretch_of_rows_is_encoded_as_in_the_whole(form: str) -> None:
    matrix = torch.randn(12, 256, generator=torch.Generator().manual_seed(1))
    weight = made(form, matrix)
    for name, rows in weight.encode(matrix[5:9]).items():
        assert torch.equal(rows.view(torch.uint8), weight.members()[name][5:9].contiguous().view(torch.uint8)), name


def test_nf4_products_are_those_of_the_dequantized_matrix_and_near_those_of_the_original() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix, rows = torch.randn(96, 256, generator=generator), torch.randn(2, 7, 256, generator=generator)
    weight = made("nf4", matrix)
    assert isinstance(weight, Nf4Weight)
    kept = weight.dequantized(torch.float64)
    assert error(kept, matrix) < NF4_MATRIX
    assert error(weight.product(rows), rows.double() @ kept.t()) < 1e-6
    grads = torch.randn(2, 7, 96, generator=generator)
    assert error(weight.grad_input(grads), grads.double() @ kept) < 1e-6


def test_fp8_products_are_near_those_of_the_original_whatever_the_rows_sizes() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix, rows = torch.randn(96, 256, generator=generator), torch.randn(2, 7, 256, generator=generator)
    matrix *= torch.logspace(-3, 3, 96).unsqueeze(1)
    weight = made("fp8", matrix)
    right = rows.double() @ matrix.double().t()
    found = weight.product(rows)
    # Column by column, so that the largest rows of the matrix do not hide the others.
    columns = [error(found[..., column], right[..., column]) for column in range(96)]
    assert sum(columns) / 96 < FP8_PRODUCT
    grads = torch.randn(2, 7, 96, generator=generator)
    assert error(weight.grad_input(grads), grads.double() @ matrix.double()) < FP8_PRODUCT
    out = torch.empty(2, 7, 96)
    assert weight.product(rows, out) is out
    assert torch.equal(out, found)


def test_rows_are_rounded_to_the_nearest_of_all_e4m3_values() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(7)) * torch.logspace(-6, 0, 300)
    for factors in (None, torch.rand(300, generator=torch.Generator().manual_seed(8))):
        values, scales = round_rows(rows, factors)
        exact = rows.double() if factors is None else rows.double() * factors.double()
        torch.testing.assert_close(scales[:, 0].double(), exact.abs().amax(1) / 448, rtol=1e-6, atol=0)
        target = exact / scales.double()
        least = (target.unsqueeze(-1) - every).abs().amin(-1)
        assert ((values.double() - target).abs() <= least + 1e-6 * target.abs() + 1e-12).all()


def test_fp8_products_are_those_of_rounded_factors() -> None:
    generator = torch.Generator().manual_seed(9)
    matrix, rows = torch.randn(48, 64, generator=generator), torch.randn(2, 5, 64, generator=generator)
    grads = torch.randn(2, 5, 48, generator=generator)
    weight = made("fp8", matrix)
    kept = weight.members()["weight"].double()
    scales = weight.members()["scales"].double()
    x, of_x = (part.double() for part in round_rows(rows.view(10, 64)))
    assert error(weight.product(rows).view(10, 48), (x * of_x) @ (kept * scales).t()) < 1e-6
    g, of_g = (part.double() for part in round_rows((grads.view(10, 48).double() * scales.t()).float()))
    for one in (weight, weight.at_hand(torch.float32)):
        for _ in range(2):  # the second time with the matrix that was turned
            assert error(one.grad_input(grads).view(10, 64), (g * of_g) @ kept) < 1e-6


def test_rows_of_zeros_stay_zero() -> None:
    values, scales = round_rows(torch.zeros(2, 64))
    assert torch.equal(values.float() * scales, torch.zeros(2, 64))
    for form in ("fp8", "nf4"):
        assert not made(form, torch.zeros(3, 64)).product(torch.ones(1, 64)).any()


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_many_rows_are_encoded_in_parts(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is rounded from itself alone, so that parts of a matrix are the matrix."""
    matrix = torch.randn(7, 128)
    whole = empty(form, (7, 128), "cpu").encode(matrix)
    monkeypatch.setattr(quantized_weight, "AT_ONCE", 2 * 128)
    parts = empty(form, (7, 128), "cpu").encode(matrix)
    for name, values in whole.items():
        assert torch.equal(values.view(torch.uint8), parts[name].view(torch.uint8)), name


def test_nf4_refuses_rows_of_no_whole_number_of_blocks() -> None:
    with pytest.raises(ConfigError, match=r"blocks of 64, but a rank has 96 of 192 columns"):
        empty("nf4", (2, 192), "cpu", (96, 192))


def _fused_swiglu_agrees(device: str) -> None:
    """To the bit with SwiGLU's kernels and `round_rows` after them; several programs' columns and part of one."""
    from pipeline.model.layers import quantize_kernels, triton_kernels

    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float16, torch.bfloat16)[: 1 if device == "cpu" else 2]:
        gate_up, grads = (torch.randn(3, width, generator=generator).to(device, dtype) for width in (18000, 9000))
        gate_up[1], grads[2] = 0, 0
        factors = torch.rand(18000, generator=generator).to(device)
        for spoilt in (False, True):
            if spoilt:
                gate_up[0, 17999] = float("nan")
            slope = torch.empty_like(gate_up)
            triton_kernels.swiglu_gradient_(gate_up, grads, slope)
            for found, expected in (
                (quantize_kernels.round_swiglu(gate_up), quantize_kernels.round_rows(triton_kernels.swiglu(gate_up))),
                (
                    quantize_kernels.round_swiglu_gradient(gate_up, grads, factors),
                    quantize_kernels.round_rows(slope, factors),
                ),
            ):
                for mine, theirs in zip(found, expected, strict=True):
                    # Values of a row that has become NaN say nothing: its scale does.
                    rows = slice(1 if spoilt else 0, None)
                    assert torch.equal(mine.view(torch.uint8)[rows], theirs.view(torch.uint8)[rows])
                assert bool(found[1][0].isnan()) == spoilt


def _kernels_agree(device: str) -> None:
    """With torch's operations: widths of several programs and part of one, a group that ends within a share."""
    from pipeline.model.layers import quantize_kernels as kernels
    from pipeline.model.layers.quantized_weight import _dynamic_code, _nf4_code

    generator = torch.Generator().manual_seed(6)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 2 if device == "cpu" else 3]:
        rows = torch.randn(3, 9000, generator=generator).to(device, dtype)
        rows[1] = 0
        factors = torch.rand(9000, generator=generator).to(device)
        for given in (None, factors):
            values, scales = kernels.round_rows(rows, given)
            exact = rows.double() if given is None else rows.double() * given.double()
            torch.testing.assert_close(scales[:, 0].double()[::2], exact.abs().amax(1)[::2] / 448, rtol=1e-6, atol=0)
            # What a row's scale is made of becomes the largest value, exactly.
            assert (values.float().abs().amax(1)[::2] == 448).all()
            # The interpreter rounds to e4m3 with errors of a half.
            slack = 0.6 if device == "cpu" else 2**-4
            off = (values.double() * scales.double() - exact).abs() - slack * exact.abs()
            assert (off <= scales.double() * 2**-8).all() and not (values[1].float() * scales[1]).any()
            spoilt = rows.clone()
            spoilt[0, 8999] = float("nan")
            values, scales = kernels.round_rows(spoilt, given)
            assert (values[0].float() * scales[0]).isnan().all() and (values[2].float() * scales[2]).isfinite().all()
    _fused_swiglu_agrees(device)
    for shape in ((1, 1), (130, 300), (256, 128)):
        bytes_ = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        assert torch.equal(kernels.transposed(bytes_), bytes_.t())
    for part in (None, (64 * 250, 64 * 270)):
        matrix = torch.randn(2, 64 * 270, generator=generator)
        weight = empty("nf4", (2, 64 * 270), device, part)
        weight.write(matrix.to(device))
        codes, magnitudes, second = (member.detach() for member in weight.members().values())
        tables = _nf4_code(codes.device), _dynamic_code(codes.device)
        first = 0 if part is None else 250
        found = kernels.dequantize_nf4(codes, magnitudes, second, *tables, first, torch.float32)
        with mock.patch.object(quantized_weight, "kernels_for", return_value=None):
            assert torch.equal(found, weight.dequantized(torch.float32))


def test_kernels_interpreted() -> None:
    interpret("test_quantized_weight._kernels_agree('cpu')")


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    _kernels_agree("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_a_gpu_makes_the_same_products(form: str) -> None:
    generator = torch.Generator().manual_seed(4)
    matrix, rows = torch.randn(512, 1024, generator=generator), torch.randn(1, 256, 1024, generator=generator)
    grads = torch.randn(1, 256, 512, generator=generator)
    here, there = made(form, matrix), made(form, matrix.cuda())
    for name, member in here.members().items():
        found = there.members()[name].cpu()
        if member.dtype is torch.float32:  # means and extremes are summed in another order there
            torch.testing.assert_close(found, member, rtol=1e-6, atol=0)
        else:
            differing = (member.view(torch.uint8) != found.view(torch.uint8)).float().mean()
            assert differing <= 1e-3, (name, float(differing))  # ties
    rows, grads = rows.bfloat16(), grads.bfloat16()
    assert error(there.product(rows.cuda()).cpu(), here.product(rows)) < 5e-3
    assert error(there.grad_input(grads.cuda()).cpu(), here.grad_input(grads)) < 5e-3
    # Written where it is wanted, whether the kernel can write there or not.
    whole = torch.empty(2, 256, 512, device="cuda", dtype=torch.bfloat16)
    for given in (whole[:1], whole[:, :128]):
        assert there.product(rows.cuda().view(*given.shape[:2], -1), given) is given
        assert error(given.cpu().reshape(1, 256, 512), here.product(rows)) < 5e-3
