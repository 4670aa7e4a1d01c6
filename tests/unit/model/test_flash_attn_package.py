"""The adapter of the flash-attn packages: which release is taken, which refused, and what its kernels are given.

The packages need a GPU and are rarely installed, so their functions are stood in for by plain attention that takes
arguments by the real ones' signatures, read from their sources; on a GPU with the packages test_s2_gpu.py and
test_context_kernels.py run the real ones.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from parallel.errors import ConfigError
from pipeline.model.attention import flash_packages
from pipeline.model.attention.backends import Backend, select_backend
from pipeline.model.attention.local import attend_straddling
from tests.numerics.test_context_kernels import SHAPES, straddling_errors, straddling_inputs
from tests.support.signatures import GOLDEN, WANTED, golden, known, read_all

CUDA = torch.device("cuda", 0)
TWO, FOUR = "flash_attn/flash_attn_interface.py", "flash_attn/cute/interface.py"


def obeying(distribution: str, file: str, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` of all arguments by name, called as the package's own function is."""
    signature = known(distribution, file, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return run(**bound.arguments)

    return call


def check_plain(rest: dict[str, Any]) -> None:
    """Nothing but scale and causality is asked for."""
    for name, value in rest.items():
        if name.startswith("window_size"):
            assert value in (None, -1, (None, None), (-1, -1)), (name, value)
        elif name in ("dropout_p", "softcap"):
            assert not value, (name, value)
        elif name in ("alibi_slopes", "score_mod", "mask_mod", "learnable_sink", "seqused_q", "seqused_k"):
            assert value is None, (name, value)


def scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """[B, H, Sq, Sk] of q [B, Sq, H, D] and k [B, Sk, K, D]; causal is aligned bottom-right, as both releases' is."""
    found = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * scale
    mask = torch.ones(found.shape[-2:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return found.masked_fill(~mask, float("-inf")) if causal else found


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Sq, H, D], log-sum-exps [B, H, Sq])."""
    check_plain(rest)
    weights = scores(q, k, softmax_scale, causal)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), values), weights.logsumexp(-1)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
    q_edges, k_edges = more.pop("cu_seqlens_q"), more.pop("cu_seqlens_k")
    assert q_edges.dtype == k_edges.dtype == torch.int32
    assert more.pop("max_seqlen_q") == max(q_edges.diff()) and more.pop("max_seqlen_k") == max(k_edges.diff())
    q_edges, k_edges = q_edges.tolist(), k_edges.tolist()
    places = zip(q_edges, q_edges[1:], k_edges, k_edges[1:], strict=False)
    return torch.cat([attention(q[None, a:b], k[None, c:d], v[None, c:d], **more)[0][0] for a, b, c, d in places])


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    **rest: Any,
) -> tuple[torch.Tensor, ...]:
    """FlashAttention-2's backward (arXiv 2307.08691, algorithm 2): of whatever out and log-sum-exps it is given."""
    check_plain(rest)
    assert all(x.shape == q.shape for x in (out, dout)) and lse.is_contiguous()
    ratio = q.shape[2] // k.shape[2]
    weights = (scores(q, k, softmax_scale, causal) - lse[..., None]).exp()
    inner = torch.einsum("bqhd,bkhd->bhqk", dout, v.repeat_interleave(ratio, 2))
    slope = weights * (inner - (dout * out).sum(-1).transpose(1, 2)[..., None]) * softmax_scale
    dq = torch.einsum("bhqk,bkhd->bqhd", slope, k.repeat_interleave(ratio, 2))
    dk, dv = (torch.einsum("bhqk,bqhd->bkhd", a, b).unflatten(2, (-1, ratio)) for a, b in ((slope, q), (weights, dout)))
    return dq, dk.sum(3), dv.sum(3)


def forward_2(return_softmax: bool, **more: Any) -> tuple[torch.Tensor, ...]:
    assert return_softmax is False
    return *attention(**more), torch.empty(0), torch.zeros(2, dtype=torch.int64)


def backward_2(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, softmax_lse: torch.Tensor, **more: Any) -> None:
    assert more.pop("rng_state").dtype is torch.int64
    for target, value in zip((dq, dk, dv), gradients(lse=softmax_lse, **more), strict=True):
        assert target.is_contiguous()
        target.copy_(value)


def forward_4(return_lse: bool, **more: Any) -> tuple[torch.Tensor | None, ...]:
    assert return_lse is True
    return *attention(**more), None, None, None


def install(monkeypatch: pytest.MonkeyPatch, capability: int, **versions: str) -> None:
    """A GPU of this compute capability, and these releases; version 4 also returns its log-sum-exps."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(flash_packages, "installed", names.get)
    parts = {
        "flash_attn": {
            "flash_attn_func": (TWO, lambda **k: attention(**k)[0]),
            "flash_attn_varlen_func": (TWO, packed),
        },
        "flash_attn.flash_attn_interface": {
            "_flash_attn_forward": (TWO, forward_2),
            "_flash_attn_backward": (TWO, backward_2),
        },
        "flash_attn.cute": {
            "flash_attn_func": (FOUR, attention),
            "flash_attn_varlen_func": (FOUR, lambda **k: (packed(**k), None)),
        },
        "flash_attn.cute.interface": {
            "_flash_attn_fwd": (FOUR, forward_4),
            "_flash_attn_bwd": (FOUR, gradients),
        },
    }
    for title, functions in parts.items():
        module = ModuleType(title)
        for name, (file, run) in functions.items():
            distribution = "flash-attn" if file == TWO else "flash-attn-4"
            setattr(module, name, obeying(distribution, file, name, run))
        monkeypatch.setitem(sys.modules, title, module)
    select_backend.cache_clear()


def chosen(name: str = "flash_attn", head_dim: int = 64) -> Backend:
    try:
        return select_backend(name, CUDA, torch.bfloat16, head_dim)
    finally:
        select_backend.cache_clear()


@pytest.mark.parametrize(
    ("capability", "versions", "name", "module"),
    [
        (9, {"flash_attn": "2.8.3"}, "flash_attn", "flash_attn"),
        (8, {"flash_attn": "2.1.0.post1", "flash_attn_4": "4.0.0b36"}, "flash_attn", "flash_attn"),
        (9, {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0b36"}, "flash_attn", "flash_attn.cute"),
        (9, {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0b36"}, "flash_attn_2", "flash_attn"),
        (9, {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0b36"}, "flash_attn_4", "flash_attn.cute"),
        (10, {"flash_attn_4": "4.0.0b36"}, "flash_attn", "flash_attn.cute"),
        (9, {"flash_attn": "2.2rc1"}, "flash_attn", "flash_attn"),
    ],
)
def test_the_release_for_the_device_runs(
    capability: int, versions: dict[str, str], name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, capability, **versions)
    used: list[str] = []
    for title in ("flash_attn", "flash_attn.cute"):
        inner = sys.modules[title].flash_attn_func
        monkeypatch.setattr(
            sys.modules[title],
            "flash_attn_func",
            lambda *a, title=title, inner=inner, **k: used.append(title) or inner(*a, **k),
        )
    backend = chosen(name)
    q, k, v = (torch.randn(2, 6, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found = backend.dense(q, k, v, 0.3)
    assert used == [module]
    math = select_backend("math", torch.device("cpu"), torch.float64, 8)
    torch.testing.assert_close(found, math.dense(q, k, v, 0.3), atol=1e-12, rtol=0)
    assert backend.varlen is not None
    edges = torch.tensor([0, 2, 6], dtype=torch.int32)
    found = backend.varlen(q[0], k[0], v[0], edges, edges, 4, 4, 0.3)
    expected = torch.cat([math.dense(q[:1, a:b], k[:1, a:b], v[:1, a:b], 0.3)[0] for a, b in ((0, 2), (2, 6))])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("capability", "versions", "said"),
    [
        (9, {}, "it is not installed"),
        (8, {"flash_attn_4": "4.0.0b36"}, "it needs compute capability 9 to 12"),
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


def test_a_release_that_was_named_is_not_exchanged_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 9, flash_attn="2.8.3")
    with pytest.raises(ConfigError, match="flash_attn_4 cannot be used, it is not installed"):
        chosen("flash_attn_4")
    install(monkeypatch, 9, flash_attn_4="4.0.0b36")
    with pytest.raises(ConfigError, match="flash_attn_2 cannot be used, it is not installed"):
        chosen("flash_attn_2")


def test_head_dimensions_without_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release 4's own assertions are no sentence, and come in the first step."""
    install(monkeypatch, 10, flash_attn_4="4.0.0b36")
    assert chosen(head_dim=256).name == "flash_attn"
    for odd in (60, 192):
        with pytest.raises(ConfigError, match=f"it has no kernel for head dimension {odd} here"):
            chosen(head_dim=odd)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_4"])
def test_pieces_are_merged_by_the_packages_log_sum_exps(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and every gradient of a halo, the packages' kernels being given the merged output and log-sum-exps."""
    install(monkeypatch, 9, flash_attn="2.8.3", flash_attn_4="4.0.0b36")
    backend = chosen(name)
    assert [kernel.name for kernel in backend.lse] == [name]
    tensors, weight = straddling_inputs(*shape, 8, torch.float64, torch.device("cpu"))
    found = straddling_errors(tensors, weight, attend_straddling(*tensors, backend, 0.4), 0.4)
    assert max(found.values()) < 1e-12, found


def test_an_older_release_joins_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 9, flash_attn="2.7.4")
    assert chosen("flash_attn_2").lse == ()


@pytest.mark.gpu  # such packages are found beside a GPU
@pytest.mark.parametrize("distribution", sorted(WANTED))
def test_the_installed_release_is_called_as_the_golden_one(distribution: str) -> None:
    """Of the release the golden was written for the sources say the same; of another, that every function is there."""
    version, files = golden(distribution)
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed; {GOLDEN.name} has the signatures of {version}")
    installed = read_all(Path(str(found.locate_file("."))), distribution)
    if found.version == version:
        assert installed == files
    assert installed.keys() == files.keys()
