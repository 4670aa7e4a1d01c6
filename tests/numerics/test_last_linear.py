"""The product a recomputation skips: gradients equal to the bit, and it is skipped."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.model.last_linear import _Skipped, recomputing


def _layer(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, seen: list[bool], skip: bool) -> torch.Tensor:
    hidden = torch.tanh(x * gain)
    seen.append(recomputing())
    if skip and recomputing():
        output = _Skipped.apply(hidden, weight)
        output.detach().fill_(float("nan"))  # whatever lies in the memory must not matter
        return x + output
    return x + torch.nn.functional.linear(hidden, weight)


def _gradients(skip: bool) -> tuple[list[torch.Tensor], list[bool]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 8, generator=generator, requires_grad=True)
    gains = [torch.randn(8, generator=generator).requires_grad_() for _ in range(2)]
    weights = [torch.randn(8, 8, generator=generator) for _ in range(2)]
    seen: list[bool] = []
    hidden = x
    for gain, weight in zip(gains, weights, strict=True):
        hidden = checkpoint(_layer, hidden, gain, weight, seen, skip, use_reentrant=True)
    hidden.square().sum().backward()
    return [tensor.grad for tensor in (x, *gains) if tensor.grad is not None], seen


def test_gradients_equal_to_the_bit_whatever_the_skipped_values() -> None:
    found, seen = _gradients(skip=True)
    expected, _ = _gradients(skip=False)
    assert seen == [False, False, True, True]
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(bool(a.isfinite().all()) and bool(a.any()) for a in found)
