"""Our SwiGLU against eager autograd: the same bits, and only the input kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from pipeline.model import swiglu
from pipeline.model.swiglu import _SwiGlu


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


def test_gradients_by_finite_differences() -> None:
    gate_up = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SwiGlu.apply, (gate_up,))


def _kernels_agree(device: str) -> None:
    """Triton's kernels against eager operations; the gradient lies over the input."""
    from pipeline.model import swiglu_kernels

    generator = torch.Generator().manual_seed(0)
    # 1100 columns: a whole block, and part of one.
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)):
        gate_up = (4 * torch.randn(3, 2, 2200, generator=generator)).to(device, dtype)
        gate_up[0, 0, :2] = torch.tensor([80.0, -80.0])
        grad = torch.randn(3, 2, 1100, generator=generator).to(device, dtype)
        gate, up = gate_up.double().chunk(2, dim=-1)
        slope = grad.double()
        sigmoid = gate.sigmoid()
        expected = torch.cat((slope * up * sigmoid * (1 + gate * (1 - sigmoid)), slope * gate * sigmoid), dim=-1)
        found = swiglu_kernels.forward(gate_up)
        torch.testing.assert_close(found.double(), gate * sigmoid * up, rtol=2 * tolerance, atol=tolerance)
        swiglu_kernels.backward_(gate_up, grad, gate_up)
        torch.testing.assert_close(gate_up.double(), expected, rtol=tolerance, atol=tolerance)
    assert swiglu_kernels.forward(torch.empty(0, 8, device=device)).shape == (0, 4)


def test_kernels_interpreted() -> None:
    """Triton's interpreter, which must be chosen before the kernels are imported."""
    program = "from tests.numerics.test_swiglu import _kernels_agree; _kernels_agree('cpu')"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    _kernels_agree("cuda")
    assert swiglu._fused(torch.ones(1, 2, device="cuda")) is not None
    gate_up = (4 * torch.randn(64, 1, 2048, device="cuda")).bfloat16()
    grad = torch.randn(64, 1, 1024, device="cuda").bfloat16()
    found, result = swiglu.swiglu(gate_up), torch.empty_like(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    differ = (found != functional.silu(gate) * up).float().mean()
    assert differ < 1e-3, "transformers computes so"
    swiglu.swiglu_gradient_(gate_up, grad, result)
    # Not contiguous: eager operations.
    wide = torch.empty(64, 1, 4096, device="cuda", dtype=torch.bfloat16)[..., ::2]
    swiglu.swiglu_gradient_(gate_up, grad, wide)
    torch.testing.assert_close(result, wide, rtol=2**-6, atol=2**-6)


def test_without_a_compiler_eager_operations_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no driver for Triton: told once, and nothing fails."""
    swiglu._kernels.cache_clear()
    device = torch.device("cpu")
    with pytest.warns(UserWarning, match="SwiGLU runs unfused"):
        assert swiglu._kernels(device) is None
    assert swiglu._kernels(device) is None
    swiglu._kernels.cache_clear()
