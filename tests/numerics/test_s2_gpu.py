"""Every attention backend this GPU offers, in half precision, against the fp64 definition."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from parallel.errors import ConfigError
from pipeline.config.sections import FLASH
from pipeline.model.attention.backends import Backend, select_backend
from pipeline.model.attention.local import attend, attend_block
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, Span, head_plan
from tests.numerics import attention_oracle as oracle

# flash-attn 4 compiles its kernels at their first call, one for each shape of heads.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

SEQUENCE, GROUP = 300, 64  # neither a multiple of the other, nor of a kernel's tile
HEADS = [(8, 2), (9, 3), (4, 4), (5, 1)]


NAMES = ("cudnn", "flash", "flash_attn_2", "flash_attn_4", "math")


def backend_or_skip(name: str, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend; a flash-attn package that is not there, or not for this GPU, is skipped, all else is a failure."""
    try:
        return select_backend(name, torch.device("cuda", 0), dtype, head_dim)
    except ConfigError as error:
        if name in FLASH and ("not installed" in str(error) or "compute capability" in str(error)):
            pytest.skip(str(error))
        raise


def arrays(kind: str, batch: int, sequence: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(padding mask, document ids) of a kind of layout."""
    padding = documents = None
    if "padding" in kind:
        padding = np.ones((batch, sequence), bool)
        padding[0, :37] = False
        padding[-1, -50:] = False
    if "documents" in kind:
        documents = np.arange(sequence)[None].repeat(batch, 0) // np.array([41, 130])[:batch, None]
    return padding, documents


@functools.cache
def definition_mask(
    kind: str, batch: int, heads: int, kv_heads: int, group: int | None, dilation: int = 1
) -> torch.Tensor:
    """The oracle's mask; slow to build, so kept for all backends."""
    padding, documents = arrays(kind, batch, SEQUENCE)
    return oracle.masks(batch, SEQUENCE, heads, kv_heads, group, "upper_half", padding, documents, dilation)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def both(
    spec: AttentionSpec, kind: str, batch: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, ours, definition) of output and gradients; q, k, v are views of one fused projection, as in the model."""
    generator = torch.Generator("cuda").manual_seed(3)
    fused = torch.randn(SEQUENCE, batch, heads + 2 * kv_heads, head_dim, generator=generator, device="cuda")
    fused = fused.to(dtype).requires_grad_()
    padding, documents = arrays(kind, batch, SEQUENCE)
    layout = SequenceLayout.build(batch, SEQUENCE, padding, documents)
    out = attend(
        *fused.split([heads, kv_heads, kv_heads], 2), layout, spec, head_plan(0, heads, heads, kv_heads, "upper_half")
    )
    weight = torch.randn(out.shape, generator=generator, device="cuda").to(dtype)
    (grad,) = torch.autograd.grad((out * weight).sum(), fused)

    exact = fused.detach().double().requires_grad_()
    group = GROUP if spec.kind == "s2" else None
    mask = definition_mask(kind, batch, heads, kv_heads, group, spec.dilation)
    expected = oracle.attention(*exact.split([heads, kv_heads, kv_heads], 2), mask)
    (expected_grad,) = torch.autograd.grad((expected * weight.double()).sum(), exact)

    yield "out", out, expected
    yield from zip(
        ("dq", "dk", "dv"),
        grad.split([heads, kv_heads, kv_heads], 2),
        expected_grad.split([heads, kv_heads, kv_heads], 2),
        strict=True,
    )
    if padding is not None:
        pads = torch.from_numpy(~padding).t().to("cuda")
        assert torch.equal(out[pads], torch.zeros_like(out[pads]))
        assert torch.equal(grad[pads], torch.zeros_like(grad[pads]))


@pytest.mark.parametrize("layout", ["dense", "padding", "documents", "padding and documents"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["s2", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_against_the_definition(name: str, kind: str, head_dim: int, layout: str) -> None:
    backend_or_skip(name, torch.bfloat16, head_dim)
    spec = AttentionSpec(kind, GROUP, backend=name)
    for batch in (1, 2):
        for heads, kv_heads in HEADS:
            for what, ours, theirs in both(spec, layout, batch, heads, kv_heads, head_dim, torch.bfloat16):
                error = relative_error(ours, theirs)
                # bf16 rounds at 2^-9 = 2e-3; scores, weights and gradients each round once or twice.
                assert error < (6e-3 if what == "out" else 1.5e-2), f"{what} of {heads}/{kv_heads}, B {batch}: {error}"


@pytest.mark.parametrize("layout", ["dense", "documents"])
@pytest.mark.parametrize("name", NAMES)
def test_dilated_heads_against_the_definition(name: str, layout: str) -> None:
    """Kernels are given views of every so many-th token."""
    backend_or_skip(name, torch.bfloat16, 64)
    for dilation in (2, 4):
        spec = AttentionSpec("s2", GROUP, backend=name, dilation=dilation)
        for what, ours, theirs in both(spec, layout, 2, 9, 3, 64, torch.bfloat16):
            assert relative_error(ours, theirs) < (6e-3 if what == "out" else 1.5e-2), (what, dilation)


@pytest.mark.parametrize("layout", ["dense", "padding and documents"])
def test_fp32_runs_and_is_exact(layout: str) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    for what, ours, theirs in both(AttentionSpec("s2", GROUP), layout, 2, 9, 3, 64, torch.float32):
        assert relative_error(ours, theirs) < 1e-4, what


def test_auto_is_cudnn_in_half_precision_where_it_runs() -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device)[0] < 8:
        pytest.skip("cuDNN's fused attention needs compute capability 8")
    assert select_backend("auto", device, torch.bfloat16, 128).name == "cudnn"
    assert select_backend("auto", device, torch.float32, 128).name == "efficient"
    with pytest.raises(ConfigError, match="bf16 or fp16"):
        select_backend("cudnn", device, torch.float32, 128)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_one_token_segments_and_rows(name: str) -> None:
    """Lengths where fused kernels have refused or returned NaN."""
    backend_or_skip(name, torch.bfloat16, 64)
    spec, plan = AttentionSpec("s2", 2, backend=name), head_plan(0, 4, 4, 2, "upper_half")
    for sequence in (1, 2, 3, 5):
        q, k, v = (
            torch.randn(sequence, 2, heads, 64, device="cuda").bfloat16().requires_grad_() for heads in (4, 2, 2)
        )
        out = attend(q, k, v, SequenceLayout.dense(2, sequence), spec, plan)
        mask = oracle.masks(2, sequence, 4, 2, 2)
        exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
        expected = oracle.attention(*exact, mask)
        assert relative_error(out, expected) < 6e-3
        out.sum().backward()
        expected.sum().backward()
        assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()
        assert relative_error(v.grad, exact[2].grad) < 1.5e-2


def test_queries_may_be_the_end_of_a_key_segment() -> None:
    q, k, v = (torch.randn(1, 96, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    for name in ("cudnn", "flash", "math"):
        backend = select_backend(name, q.device, q.dtype, 64)
        whole = attend_block(q, k, v, Span(0, 1, 0, 96), Span(0, 1, 0, 96), backend, 0.125)
        tail = attend_block(q[:, 40:], k, v, Span(0, 1, 40, 56), Span(0, 1, 0, 96), backend, 0.125)
        assert relative_error(tail, whole[:, 40:]) < 1e-2


def test_no_keys_are_copied_and_layers_share_the_edges() -> None:
    """Peak memory of a forward pass: the output and the kernels' log-sum-exp, no K or V."""
    sequence, heads, kv_heads, head_dim = 16384, 8, 8, 128
    q, k, v = (torch.randn(sequence, 1, h, head_dim, device="cuda").bfloat16() for h in (heads, kv_heads, kv_heads))
    plan, spec = head_plan(0, heads, heads, kv_heads, "upper_half"), AttentionSpec("s2", 4096, backend="flash")
    layout = SequenceLayout.dense(1, sequence)
    attend(q, k, v, layout, spec, plan)  # warm-up: workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(q, k, v, layout, spec, plan)
    rise = torch.cuda.max_memory_allocated() - before
    output = q.numel() * q.element_size()
    # Twice the output (a part before it is placed), plus fp32 log-sum-exp; one copied K or V would add one more.
    assert rise < 2.2 * output
    documents = SequenceLayout.build(1, sequence, document_ids_BS=np.arange(sequence)[None] // 1000)
    attend(q, k, v, documents, spec, plan)
    torch.cuda.set_sync_debug_mode("error")  # a second layer must not wait for the device
    try:
        attend(q, k, v, documents, spec, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
