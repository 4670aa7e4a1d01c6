"""A refusal to page-lock is a code and nothing more: the next kernel does not raise it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from parallel.axes import pinned


@pytest.mark.gpu
def test_a_refusal_does_not_reach_the_next_kernel() -> None:
    memory = torch.zeros(1 << 20)
    assert pinned.pin(memory) == 0
    try:
        assert pinned.pin(memory) == 712, "cudaErrorHostMemoryAlreadyRegistered"
        total = torch.ones(1000, device="cuda").cumsum(0)[-1]
        assert float(total) == 1000
    finally:
        pinned.unpin(memory)


@pytest.mark.parametrize("code", [0, 2])
def test_only_a_refusal_launches_a_kernel_to_clear_it(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def ones(*shape: int, device: str) -> torch.Tensor:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: code))
    monkeypatch.setattr(torch, "ones", ones)
    assert pinned.pin(torch.zeros(3)) == code
    assert launched == (["cuda"] if code else [])
