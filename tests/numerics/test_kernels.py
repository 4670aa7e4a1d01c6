"""Triton's kernels against eager operations: interpreted on any machine, and compiled on a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn import functional

from pipeline.model.layers import kernel_choice, lora_functions, mlp, norm, rotary, swiglu
from pipeline.model.layers.frozen_weight import DenseWeight
from tests.support.interpreted import interpret_all
from tests.support.single import single_groups

DTYPES = ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9))


def _swiglu_agrees(device: str) -> None:
    """The gradient lies over the input."""
    from pipeline.model.layers import triton_kernels as kernels

    generator = torch.Generator().manual_seed(0)
    # 1100 columns: a whole block, and part of one.
    for dtype, tolerance in DTYPES:
        gate_up = (4 * torch.randn(3, 2, 2200, generator=generator)).to(device, dtype)
        gate_up[0, 0, :2] = torch.tensor([80.0, -80.0])
        grad = torch.randn(3, 2, 1100, generator=generator).to(device, dtype)
        gate, up = gate_up.double().chunk(2, dim=-1)
        slope = grad.double()
        sigmoid = gate.sigmoid()
        expected = torch.cat((slope * up * sigmoid * (1 + gate * (1 - sigmoid)), slope * gate * sigmoid), dim=-1)
        found = kernels.swiglu(gate_up)
        torch.testing.assert_close(found.double(), gate * sigmoid * up, rtol=2 * tolerance, atol=tolerance)
        kernels.swiglu_gradient_(gate_up, grad, gate_up)
        torch.testing.assert_close(gate_up.double(), expected, rtol=tolerance, atol=tolerance)
    assert kernels.swiglu(torch.empty(0, 8, device=device)).shape == (0, 4)


def _rotation_agrees(device: str) -> None:
    """Both ways to the bit, from strided inputs; head widths that are no power of two, more heads than a block has."""
    from pipeline.model.layers import triton_kernels as kernels

    generator = torch.Generator().manual_seed(1)
    for dtype, _ in DTYPES:
        for heads, width in ((3, 128), (40, 128), (2, 80), (1, 6)):
            angles = torch.randn(5, width // 2, generator=generator)
            cos, sin = (1.1 * angles.cos()).to(device), (1.1 * angles.sin()).to(device)
            fused_qkv = torch.randn(5, 2, heads, 3 * width, generator=generator).to(device, dtype)
            x = fused_qkv[..., width : 2 * width].detach().requires_grad_()
            grad = torch.randn(5, 2, heads, width, generator=generator).to(device, dtype)
            # Eager operations wherever the tensors are.
            small, large = cos.to(dtype)[:, None, None], sin.to(dtype)[:, None, None]
            first, second = x.chunk(2, dim=-1)
            expected = torch.cat((first * small - second * large, second * small + first * large), dim=-1)
            expected.backward(grad)
            assert x.grad is not None
            # The interpreter cuts bf16 off instead of rounding it.
            slack = 0.1 if dtype is torch.bfloat16 and device == "cpu" else 0.0
            twin = x.detach().requires_grad_()
            turned = rotary._Rotate.apply(twin, cos, sin, kernels)
            # Of a gradient whose last stride is not 1 a copy is turned.
            (slope,) = torch.autograd.grad(turned, twin, grad.repeat_interleave(2, dim=-1)[..., ::2])
            for found, wanted in ((turned, expected), (slope, x.grad)):
                assert found.dtype is dtype and found.is_contiguous()
                torch.testing.assert_close(found, wanted, rtol=0, atol=slack, msg=f"{dtype} {heads} {width}")


def _update_agrees(device: str) -> None:
    """LoRA's update over its base, in shapes that are no multiple of a program's."""
    from pipeline.model.layers import triton_kernels as kernels

    generator = torch.Generator().manual_seed(2)
    # The interpreter's matrix product takes bf16's bits for integers.
    half = ((torch.float16, 2**-10), (torch.bfloat16, 2**-8))
    for dtype, tolerance in half[: 1 if device == "cpu" else 2]:
        for rows, columns, rank in ((70, 200, 24), (64, 128, 16), (5, 3, 1), (130, 40, 128)):
            base, low, b = (
                torch.randn(shape, generator=generator).to(device, dtype)
                for shape in ((rows, columns), (rows, rank), (columns, rank))
            )
            expected = base.double() + 0.5 * low.double() @ b.double().t()
            kernels.add_update_(base, low, b, 0.5)
            torch.testing.assert_close(base.double(), expected, rtol=2 * tolerance, atol=2 * tolerance)
            # What torch's product refuses, not read beyond its end.
            for wrong in (low[: rows // 2], low.float()):
                with pytest.raises(AssertionError, match="wherever it is told to"):
                    kernels.add_update_(base, wrong, b, 0.5)


def _norms_agree(device: str) -> None:
    """Against fp64, rows that do not share out evenly, a width that is no power of two."""
    from pipeline.model.layers import triton_kernels as kernels

    generator = torch.Generator().manual_seed(3)
    for dtype, tolerance in DTYPES:
        for rows, width in (((7, 3), 96), ((1, 1), 64), ((9, 2), 1000)):
            x, grad = (torch.randn(*rows, width, generator=generator).to(device, dtype) for _ in range(2))
            weight = torch.rand(width, generator=generator).add(0.5).to(device, dtype)
            exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
            functional.rms_norm(exact[0], (width,), exact[1], 1e-5).backward(grad.double())
            normed = kernels.norm(x, weight, 1e-5)
            exactly = functional.rms_norm(exact[0], (width,), exact[1], 1e-5)
            assert normed.dtype is dtype
            torch.testing.assert_close(normed.double(), exactly, rtol=tolerance, atol=tolerance)
            assert torch.equal(normed[2:5], kernels.norm(x[2:5], weight, 1e-5)), "rows stand alone"
            found = kernels.norm_gradient(x, weight, grad, 1e-5)
            for tensor, twin in zip(found, exact, strict=True):
                assert twin.grad is not None and tensor.dtype is dtype
                torch.testing.assert_close(tensor.double(), twin.grad, rtol=2 * tolerance, atol=4 * tolerance)
    # No tokens, and a weight of another dtype.
    assert kernels.norm(x[:0], weight, 1e-5).shape == (0, 2, 1000)
    none, total = kernels.norm_gradient(x[:0], weight.float(), x[:0], 1e-5)
    assert none.shape == (0, 2, 1000) and total.dtype is torch.float32 and not total.any()
    _, total = kernels.norm_gradient(x, weight.float(), grad, 1e-5)
    torch.testing.assert_close(total, found[1].float(), rtol=2 * tolerance, atol=4 * tolerance)


def _stream_joins(device: str) -> None:
    """The gradient of what goes on beside a norm is added before the sum is rounded; both against fp64."""
    from pipeline.model.layers import triton_kernels as kernels

    generator = torch.Generator().manual_seed(5)
    for dtype, tolerance in DTYPES:
        x, grad, beside = (torch.randn(5, 2, 96, generator=generator).to(device, dtype) for _ in range(3))
        weight = torch.rand(96, generator=generator).add(0.5).to(device, dtype)
        exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
        normed = functional.rms_norm(exact[0], (96,), exact[1], 1e-5)
        torch.autograd.backward([normed, exact[0] * 1], [grad.double(), beside.double()])
        leaf = x.clone().requires_grad_()
        output, stream = norm._NormBesideStream.apply(leaf, weight, 1e-5, kernels)
        assert torch.equal(stream, x)
        torch.autograd.backward([output, stream], [grad, beside])
        assert leaf.grad is not None and leaf.grad.dtype is dtype
        torch.testing.assert_close(leaf.grad.double(), exact[0].grad, rtol=2 * tolerance, atol=4 * tolerance)
        # The sum of two, of which both get this gradient. Halves: the interpreter cuts sums off instead of rounding.
        pair = [(x / 2).requires_grad_(), (x / 2).requires_grad_()]
        total, normed = norm._NormOfSum.apply(*pair, weight, 1e-5, kernels)
        assert torch.equal(total, x) and torch.equal(normed, output)
        torch.autograd.backward([total, normed], [beside, grad])
        assert all(half.grad is not None and torch.equal(half.grad, leaf.grad) for half in pair)


def _qkv_agrees(device: str) -> None:
    """Cut and turned both ways, to the bit of eager operations, for grouped heads and for as many KV heads."""
    from pipeline.model.layers import qkv_kernels

    generator = torch.Generator().manual_seed(6)
    # The interpreter cuts bf16 off instead of rounding it.
    for dtype in (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.bfloat16):
        for groups, ratio, width in ((2, 3, 16), (3, 1, 128), (1, 8, 6), (40, 1, 64)):
            angles = torch.randn(5, width // 2, generator=generator)
            cos, sin = (1.1 * angles.cos()).to(device), (1.1 * angles.sin()).to(device)
            x = torch.randn(5, 2, groups * (ratio + 2) * width, generator=generator).to(device, dtype)
            grads = [
                torch.randn(5, 2, heads, width, generator=generator).to(device, dtype)
                for heads in (groups * ratio, groups, groups)
            ]
            twin = x.clone().requires_grad_()
            q, k, v = twin.unflatten(-1, (groups, ratio + 2, width)).split((ratio, 1, 1), dim=3)
            small, large = cos.to(dtype)[:, None, None], sin.to(dtype)[:, None, None]

            def turn(part: torch.Tensor, small: torch.Tensor = small, large: torch.Tensor = large) -> torch.Tensor:
                first, second = part.chunk(2, dim=-1)
                return torch.cat((first * small - second * large, second * small + first * large), dim=-1)

            expected = turn(q.flatten(2, 3)), turn(k.squeeze(3)), v.squeeze(3)
            torch.autograd.backward(expected, grads)
            leaf = x.clone().requires_grad_()
            found = rotary._SplitAndRotate.apply(leaf, groups, groups * ratio, cos, sin, qkv_kernels)
            torch.autograd.backward(found, grads)
            for one, other in ((leaf.grad, twin.grad), *zip(found, expected, strict=True)):
                assert one is not None and one.is_contiguous()
                torch.testing.assert_close(one, other, rtol=0, atol=0, msg=f"{dtype} {groups} {ratio} {width}")


def _merge_agrees(device: str) -> None:
    """Attention over two sets of keys against attention over all, in fp64; strided outputs, both shapes of lse."""
    from pipeline.model.attention import backends, merge_kernel

    generator = torch.Generator().manual_seed(7)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        scores = torch.randn(2, 3, 37, 9, generator=generator).mul_(4).double()
        values = torch.randn(2, 3, 9, 6, generator=generator).double()
        parts = []
        for span in (slice(0, 5), slice(5, 9)):
            out = scores[..., span].softmax(-1) @ values[:, :, span]
            # As kernels return it: tokens before heads in memory.
            strided = out.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2)
            parts += [strided, scores[..., span].logsumexp(-1, keepdim=dtype is torch.float16).float().to(device)]
        found, lse = merge_kernel.merge(*parts)
        eager, eager_lse = backends.merge_outputs(*(part.cpu() for part in parts))
        for one, total in ((found, lse), (eager, eager_lse)):
            assert one.dtype is dtype and one.stride() == parts[2].stride() and total.shape == parts[3].shape
            expected = scores.softmax(-1) @ values
            torch.testing.assert_close(one.double().cpu(), expected, rtol=tolerance, atol=tolerance)
            whole = scores.logsumexp(-1).view(total.shape)
            torch.testing.assert_close(total.double().cpu(), whole, rtol=1e-6, atol=1e-5)


CHECKS = (
    "_swiglu_agrees",
    "_rotation_agrees",
    "_update_agrees",
    "_norms_agree",
    "_stream_joins",
    "_qkv_agrees",
    "_merge_agrees",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What each of CHECKS fails with under the interpreter."""
    told = interpret_all([f"test_kernels.{check}('cpu')" for check in CHECKS])
    return dict(zip(CHECKS, told.values(), strict=True))


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[check], interpreted[check]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS[4:])
def test_fused_passes_on_a_gpu(check: str) -> None:
    globals()[check]("cuda")


@pytest.mark.gpu
def test_swiglu_on_a_gpu() -> None:
    _swiglu_agrees("cuda")
    gate_up = (4 * torch.randn(64, 1, 2048, device="cuda")).bfloat16()
    grad = torch.randn(64, 1, 1024, device="cuda").bfloat16()
    assert kernel_choice.kernels_for(gate_up, grad) is not None
    found, result = swiglu.swiglu(gate_up), torch.empty_like(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    differ = (found != functional.silu(gate) * up).float().mean()
    assert differ < 1e-3, "transformers computes so"
    version = result._version
    swiglu.swiglu_gradient_(gate_up, grad, result)
    assert result._version > version, "autograd must see it"
    # Not contiguous: eager operations.
    wide = torch.empty(64, 1, 4096, device="cuda", dtype=torch.bfloat16)[..., ::2]
    swiglu.swiglu_gradient_(gate_up, grad, wide)
    torch.testing.assert_close(result, wide, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
def test_rotation_on_a_gpu() -> None:
    _rotation_agrees("cuda")
    angles = torch.rand(7, 64, device="cuda")
    x = torch.randn(7, 2, 8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    turned = rotary.apply_rope(x, angles.cos(), angles.sin())
    (found,) = torch.autograd.grad(turned, x, grad)
    # A last stride that is not 1: eager operations.
    other = x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
    again = rotary.apply_rope(other, angles.cos(), angles.sin())
    assert torch.equal(turned, again)
    again.backward(grad)
    assert other.grad is not None and torch.equal(found, other.grad)


@pytest.mark.gpu
def test_update_on_a_gpu() -> None:
    _update_agrees("cuda")


@pytest.mark.gpu
def test_norms_on_a_gpu() -> None:
    _norms_agree("cuda")
    for rows, width in ((4096, 8192), (5, 16384)):
        x = torch.randn(rows, 1, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.rand(width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(rows, 1, width, device="cuda", dtype=torch.bfloat16)
        found = torch.autograd.grad(
            norm._Norm.apply(x, weight, 1e-5, kernel_choice.kernels_for(x, weight)), (x, weight), grad
        )
        expected = torch.autograd.grad(functional.rms_norm(x, (width,), weight, 1e-5), (x, weight), grad)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).float().norm() < 4e-3 * other.float().norm()


def test_without_a_compiler_eager_operations_serve() -> None:
    """A CPU has no driver for Triton: told once, and nothing fails."""
    kernel_choice.load_kernels.cache_clear()
    device = torch.device("cpu")
    with pytest.warns(UserWarning, match="run unfused"):
        assert kernel_choice.load_kernels(device) is None
    assert kernel_choice.load_kernels(device) is None
    kernel_choice.load_kernels.cache_clear()


def test_memory_that_is_short_for_a_moment_switches_no_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("pipeline.model.layers.triton_kernels")
    kernel_choice.load_kernels.cache_clear()
    monkeypatch.setattr(kernels, "probe", mock.Mock(side_effect=[torch.OutOfMemoryError, None]))
    device = torch.device("cpu")
    with pytest.raises(torch.OutOfMemoryError):
        kernel_choice.load_kernels(device)
    assert kernel_choice.load_kernels(device) is kernels
    kernel_choice.load_kernels.cache_clear()


def test_an_update_of_a_strided_base_is_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel takes rows to lie one behind the other."""
    asked: list[bool] = []

    def kernels_for(first: torch.Tensor, *others: torch.Tensor) -> None:
        asked.append(all(tensor.is_contiguous() for tensor in others))

    monkeypatch.setattr(lora_functions, "kernels_for", kernels_for)
    low, b = torch.randn(6, 1, 4).half(), torch.randn(20, 4).half()
    for whole in (torch.zeros(6, 1, 40), torch.zeros(6, 1, 20)):
        base = whole.half()[..., :20]
        lora_functions.AddUpdate.apply(base, low, b, 1.0)
        assert torch.equal(base, torch.addmm(torch.zeros(6, 20).half(), low[:, 0], b.t())[:, None])
    assert asked == [False, True]


def test_a_second_derivative_is_refused() -> None:
    """What kernels and frozen products compute has none, and a wrong one would not be noticed."""
    x, weight = torch.randn(3, 2, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    kernels = mock.Mock()
    kernels.norm.side_effect = lambda x, weight, eps: functional.rms_norm(x, weight.shape, weight, eps)
    kernels.norm_gradient.side_effect = lambda x, weight, grad, eps: (grad * weight, (grad * x).sum((0, 1)))
    recipe = norm.norm_recipe(x, weight, 1e-5)
    matrices = [DenseWeight(torch.nn.Parameter(torch.randn(shape))) for shape in ((12, 8), (8, 6))]
    for output in (
        norm._Norm.apply(x, weight, 1e-5, kernels),
        lora_functions.OfMade.apply(
            functional.rms_norm(x, (8,), weight, 1e-5), torch.randn(4, 8, requires_grad=True), recipe
        ),
        mlp._FrozenMlp.apply(x, *matrices, single_groups().collection.tp, False, None, False),
    ):
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()
