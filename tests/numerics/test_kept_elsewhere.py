"""Gate and up in 8 bits, with the error that is stated, and in host memory, with none."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from parallel.errors import LongspanError
from pipeline.model.layers import activation, fp8, parking
from pipeline.model.layers.activation import SwiGlu
from pipeline.model.layers.parking import Parking
from pipeline.planning.recompute import RecomputePolicy
from tests.support.interpreted import interpret


def _numbers(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _error_is_the_stated_one(device: str, dtype: torch.dtype, to_fp8: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    x = _numbers(5, 3, 2 * 700, device=device, dtype=dtype)
    x[0, 0, 3], x[1, 0, :700], x[2, 2, 700:] = 300.0, 0.0, _numbers(700, device=device, dtype=dtype, seed=1) * 1e-3
    rounded, scales = to_fp8(x)
    assert rounded.dtype is torch.float8_e4m3fn and rounded.shape == x.shape and scales.shape == (5, 3, 2)
    back = fp8.from_fp8(rounded, scales, torch.float64)
    halves = x.double().unflatten(-1, (2, -1))
    largest = halves.abs().amax(-1, keepdim=True)
    error = (back.unflatten(-1, (2, -1)) - halves).abs()
    # One more rounding, of the quotient.
    assert bool((error <= 1.001 * torch.maximum(halves.abs() * 2.0**-4, largest * 2.0**-19)).all())
    assert bool((error[0, 1] > 0.01 * halves[0, 1].abs()).any()), "that is 8 bits"
    assert not back[1, 0, :700].any()


def test_rounding() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _error_is_the_stated_one("cpu", dtype, fp8.to_fp8)


def _kernels_agree(device: str) -> None:
    from pipeline.model.layers import fp8_kernels

    # The interpreter takes bf16's bits for integers in places.
    for dtype in (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.bfloat16):
        # The interpreter rounds to e4m3 with errors of a half: there only the gradient's kernel is looked at.
        to_fp8 = fp8.to_fp8 if device == "cpu" else fp8_kernels.to_fp8
        _error_is_the_stated_one(device, dtype, to_fp8)
        x = _numbers(4, 2, 2 * 1100, device=device, dtype=dtype)
        grad = _numbers(4, 2, 1100, device=device, dtype=dtype, seed=2)
        rounded, scales = to_fp8(x)
        gate, up = fp8.from_fp8(rounded, scales, dtype).double().chunk(2, dim=-1)
        sigmoid, slope = gate.sigmoid(), grad.double()
        expected = torch.cat((slope * up * sigmoid * (1 + gate * (1 - sigmoid)), slope * gate * sigmoid), dim=-1)
        found = fp8_kernels.gradient(rounded, scales, grad)
        tolerance = 1e-5 if dtype is torch.float32 else 2**-7
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_kernels_interpreted() -> None:
    interpret("test_kept_elsewhere._kernels_agree('cpu')")


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("this GPU's kernels do not know e4m3")
    _kernels_agree("cuda")
    with mock.patch.object(fp8, "fp8_kernels_for", wraps=fp8.fp8_kernels_for) as asked:
        _gradients_differ_as_stated("cuda", torch.bfloat16)
    assert asked.call_count >= 2


def _gradients_differ_as_stated(device: str, dtype: torch.dtype) -> None:
    gradients = {}
    for policy in (RecomputePolicy.POINTWISE, RecomputePolicy.FP8):
        x = _numbers(64, 1, 512, device=device, dtype=dtype).requires_grad_()
        product = SwiGlu(None, policy)(x * 1)  # type: ignore[arg-type]
        product.backward(_numbers(64, 1, 256, device=device, dtype=dtype, seed=3))
        assert x.grad is not None
        gradients[policy] = x.grad.double(), product.detach()
    (exact, output), (found, same) = gradients.values()
    assert torch.equal(output, same), "the forward is made with the values as they are"
    error = float((found - exact).norm() / exact.norm())
    assert 0.005 < error < 0.03
    bias = float((found * exact).sum() / exact.square().sum()) - 1
    assert abs(bias) < 2e-3


def test_gradients_in_8_bits() -> None:
    _gradients_differ_as_stated("cpu", torch.float32)


def _host_gives_back_what_it_was_given(device: str) -> None:
    lot, layers = Parking(torch.device(device)), 6
    with mock.patch.object(activation, "parking_of", lambda device: lot):
        for micro in range(3):
            x = _numbers(32, 1, 64, device=device, seed=micro)
            found = {}
            for policy in (RecomputePolicy.POINTWISE, RecomputePolicy.HOST):
                leaf, outputs = x.clone().requires_grad_(), []
                for layer in range(layers):
                    outputs.append(SwiGlu(None, policy)(leaf * (layer + 1)))  # type: ignore[arg-type]
                if policy is RecomputePolicy.HOST:
                    # Two are still there, the others' memory is free.
                    assert [one.gpu is not None for one in lot._leaving] == [True, True]
                for output in reversed(outputs):
                    output.square().sum().backward(retain_graph=False)
                assert leaf.grad is not None
                found[policy] = leaf.grad
            assert torch.equal(*found.values())
            assert bool(found[RecomputePolicy.HOST].any())
    # The next step takes the last one's memory.
    assert lot.bytes == layers * 32 * 64 * 4 and not lot._leaving


def test_host_memory() -> None:
    _host_gives_back_what_it_was_given("cpu")


def _a_short_chunk_takes_the_room_of_whole_ones(device: str) -> None:
    """A stream's last chunk parks first. Its buffers were of its own size, and whole chunks took others beside them."""
    lot, whole = Parking(torch.device(device)), 48 * 64
    lot.expect(4 * whole)
    for size in (whole // 3, whole, whole // 3, whole):
        given = [_numbers(size, device=device, seed=layer) for layer in range(5)]
        parked = [lot.park(one.clone()) for one in given]
        for one, other in zip(reversed(given), reversed(parked), strict=True):
            assert torch.equal(lot.take(other), one)
        assert lot.bytes == 5 * 4 * whole
    # Of several that are free the smallest that will do.
    lot.expect(0)
    held = [lot.park(_numbers(whole, device=device)) for _ in range(6)]
    assert lot.bytes == 6 * 4 * whole
    larger = lot.park(_numbers(2 * whole, device=device))
    for other in (larger, *reversed(held)):
        lot.take(other)
    assert lot.park(_numbers(whole, device=device)).buffer.numel() == whole and lot.bytes == 8 * 4 * whole


def test_a_short_chunk_takes_the_room_of_whole_ones() -> None:
    _a_short_chunk_takes_the_room_of_whole_ones("cpu")


@pytest.mark.gpu
def test_a_short_chunk_takes_the_room_of_whole_ones_on_a_gpu() -> None:
    _a_short_chunk_takes_the_room_of_whole_ones("cuda")


@pytest.mark.gpu
def test_host_memory_of_a_gpu() -> None:
    _host_gives_back_what_it_was_given("cuda")


def test_pipelined_micro_batches_come_back_in_the_order_of_1f1b() -> None:
    """Two under way, the first one's backward first; a user's own tensor is not written to."""
    lot = Parking(torch.device("cpu"))
    with mock.patch.object(activation, "parking_of", lambda device: lot):
        leaves = [_numbers(8, 1, 16, seed=seed).requires_grad_() for seed in range(2)]
        kept = [leaf.detach().clone() for leaf in leaves]
        outputs = [[SwiGlu(None, RecomputePolicy.HOST)(leaf) for _ in range(3)] for leaf in leaves]  # type: ignore[arg-type]
        for leaf, outs, copy in zip(leaves, outputs, kept, strict=True):
            for out in reversed(outs):
                out.sum().backward()
            twin = copy.clone().requires_grad_()
            (3 * SwiGlu(None)(twin)).sum().backward()  # type: ignore[arg-type]
            assert leaf.grad is not None and torch.allclose(leaf.grad, twin.grad, rtol=1e-6) and torch.equal(leaf, copy)
    once = SwiGlu(None, RecomputePolicy.HOST)(leaves[0] * 1)  # type: ignore[arg-type]
    once.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given back once"):
        once.sum().backward()


def test_memory_that_cannot_be_pinned_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    lot = Parking(torch.device("cpu"))
    monkeypatch.setattr(parking, "pin", lambda memory: 2)
    lot._stream = mock.Mock()
    with pytest.raises(LongspanError, match=r"train\.gate_up: host: .* cannot be pinned .*set train\.gate_up: gpu"):
        lot.park(torch.zeros(4))
