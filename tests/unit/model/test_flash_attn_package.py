"""The adapter of the flash-attn package: which release is taken, which refused, and what its kernels are given.

The package needs a GPU and is rarely installed, so its two functions are stood in for by plain attention; on a GPU with
the package tests/numerics/test_s2_gpu.py runs the real ones.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

from parallel.errors import ConfigError
from pipeline.model.attention import backends
from pipeline.model.attention.backends import Backend, select_backend

CUDA = torch.device("cuda", 0)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool) -> torch.Tensor:
    """[B, S, H, D], aligned bottom-right as both releases are; keyword names are the package's."""
    assert causal
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **more: Any,
) -> torch.Tensor:
    q_edges, k_edges = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q == max(cu_seqlens_q.diff()) and max_seqlen_k == max(cu_seqlens_k.diff())
    places = zip(q_edges, q_edges[1:], k_edges, k_edges[1:], strict=False)
    return torch.cat([plain(q[None, a:b], k[None, c:d], v[None, c:d], **more)[0] for a, b, c, d in places])


def install(monkeypatch: pytest.MonkeyPatch, capability: int, **versions: str) -> None:
    """A GPU of this compute capability, and these releases; version 4 also returns its log-sum-exps."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(backends, "_installed", names.get)
    two, four = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    two.flash_attn_func, two.flash_attn_varlen_func = plain, varlen  # type: ignore[attr-defined]
    four.flash_attn_func = lambda *a, **k: (plain(*a, **k), "lse")  # type: ignore[attr-defined]
    four.flash_attn_varlen_func = lambda *a, **k: (varlen(*a, **k), "lse")  # type: ignore[attr-defined]
    for module in (two, four):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    select_backend.cache_clear()


def chosen() -> Backend:
    try:
        return select_backend("flash_attn", CUDA, torch.bfloat16, 64)
    finally:
        select_backend.cache_clear()


@pytest.mark.parametrize(
    ("capability", "versions", "module"),
    [
        (9, {"flash_attn": "2.8.3"}, "flash_attn"),
        (8, {"flash_attn": "2.1.0.post1", "flash_attn_4": "4.0.0b36"}, "flash_attn"),
        (9, {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0b36"}, "flash_attn.cute"),
        (10, {"flash_attn_4": "4.0.0b36"}, "flash_attn.cute"),
        (9, {"flash_attn": "2.2rc1"}, "flash_attn"),
    ],
)
def test_the_release_for_the_device_runs(
    capability: int, versions: dict[str, str], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, capability, **versions)
    used: list[str] = []
    for name in ("flash_attn", "flash_attn.cute"):
        inner = sys.modules[name].flash_attn_func
        monkeypatch.setattr(
            sys.modules[name],
            "flash_attn_func",
            lambda *a, name=name, inner=inner, **k: used.append(name) or inner(*a, **k),
        )
    backend = chosen()
    q, k, v = (torch.randn(2, 6, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found = backend.dense(q, k, v, 0.3)
    assert used == [module]
    math = select_backend("math", torch.device("cpu"), torch.float64, 8)
    torch.testing.assert_close(found, math.dense(q, k, v, 0.3), atol=1e-12, rtol=0)
    assert backend.varlen is not None
    edges = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = backend.varlen(q[0], k[0], v[0], edges, edges, 4, 4, 0.3)
    expected = torch.cat([math.dense(q[:1, a:b], k[:1, a:b], v[:1, a:b], 0.3)[0] for a, b in ((0, 2), (2, 6))])
    torch.testing.assert_close(packed, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("capability", "versions", "said"),
    [
        (9, {}, "it is not installed"),
        (8, {"flash_attn_4": "4.0.0b36"}, "it needs compute capability 9 or newer"),
        (9, {"flash_attn": "2.0.9"}, "flash-attn 2.0.9 is too old; install 2.1 or newer"),
        (9, {"flash_attn": "1.0.9"}, "flash-attn 1.0.9 is too old"),
        (7, {"flash_attn": "2.8.3"}, "needs compute capability 8 or newer"),
        (9, {"flash_attn": "nightly"}, "flash-attn nightly is too old"),
    ],
)
def test_other_releases_and_devices_are_refused(
    capability: int, versions: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, capability, **versions)
    with pytest.raises(ConfigError, match=r"^attention\.backend: ") as refused:
        chosen()
    assert said in str(refused.value)


def test_a_release_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 9, flash_attn="2.8.3")
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_varlen_func")
    with pytest.raises(ConfigError, match=r"flash-attn 2\.8\.3 is installed but does not load"):
        chosen()
