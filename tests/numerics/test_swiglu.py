"""Our SwiGLU against eager autograd: the same bits, and only the input kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pipeline.model.layers import swiglu
from pipeline.model.layers.activation import _SwiGlu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_eager_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = (4 * torch.randn(7, 2, 24, generator=generator)).to(dtype).requires_grad_()
    twin = fused.detach().clone().requires_grad_()
    upstream = torch.randn(7, 2, 12, generator=generator).to(dtype)
    gate, up = twin.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    found = _SwiGlu.apply(fused)
    assert torch.equal(found, expected)
    found.backward(upstream)
    expected.backward(upstream)
    assert fused.grad is not None and twin.grad is not None and torch.equal(fused.grad, twin.grad)


def test_keeps_only_its_input() -> None:
    kept: list[torch.Size] = []
    gate_up = torch.randn(5, 1, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        _SwiGlu.apply(gate_up)
    assert kept == [gate_up.shape]


def test_an_input_that_is_not_contiguous_gets_its_gradient() -> None:
    """Memory shaped like it would be written to through a copy, and so never."""
    x, grad = torch.randn(3, 5, 8, requires_grad=True), torch.randn(5, 3, 4)
    gate, up = x.transpose(0, 1).chunk(2, dim=-1)
    (expected,) = torch.autograd.grad(functional.silu(gate) * up, x, grad)
    (found,) = torch.autograd.grad(_SwiGlu.apply((x * 1.0).transpose(0, 1)), x, grad)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="view"):
        swiglu.swiglu_gradient_(x.detach().transpose(0, 1), grad, torch.empty(3, 5, 8).transpose(0, 1))


def test_what_a_user_made_is_not_written_over() -> None:
    leaf = torch.randn(4, 16, requires_grad=True)
    before = leaf.detach().clone()
    _SwiGlu.apply(leaf.view(4, 1, 16)).sum().backward()
    assert torch.equal(leaf, before) and leaf.grad is not None and bool(leaf.grad.any())


class _Unseen:
    """Kernels that write, as Triton's, where autograd does not see it."""

    @staticmethod
    def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.detach().chunk(2, dim=-1)
        return functional.silu(gate) * up

    @staticmethod
    def swiglu_gradient_(gate_up: torch.Tensor, grad: torch.Tensor, result: torch.Tensor) -> None:
        result.data.fill_(1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_second_backward_is_refused(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """The first wrote its gradient over what the second would need."""
    if fused:
        monkeypatch.setattr(swiglu, "kernels_for", lambda *tensors: _Unseen)
    gate_up = torch.randn(5, 1, 8, requires_grad=True)
    total = _SwiGlu.apply(gate_up * 1.0).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_gradients_by_finite_differences() -> None:
    gate_up = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SwiGlu.apply, (gate_up,))
