"""S²-Attn against the definition, the published roll, and its own promises: causal, unpadded, uncopied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parallel.errors import ConfigError
from pipeline.model.attention import local
from pipeline.model.attention.backends import Backend, select_backend
from pipeline.model.attention.local import attend, attend_block
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, Span, head_plan, segments
from tests.numerics import attention_oracle as oracle

CPU = torch.device("cpu")


def random_qkv(
    sequence: int,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [S, B, Hq, D], k and v [S, B, Hkv, D], requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sequence, batch, count, dim, generator=generator, dtype=dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    return q, k, v


@pytest.mark.parametrize("kind", ["s2", "full"])
@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_oracle_forward_and_gradients(kind: str, backend: str, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(37, 2, 9, 3)
    expected = oracle.attention(q, k, v, oracle.masks(2, 37, 9, 3, 8 if kind == "s2" else None))
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
    spec = AttentionSpec(kind, 8, backend=backend)
    out = attend(*inputs, SequenceLayout.dense(2, 37), spec, head_plan(0, 9, 9, 3, "upper_half"))
    grads = torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)
    assert out.dtype == dtype and out.is_contiguous()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=0)


def test_softmax_scale_is_used() -> None:
    q, k, v = random_qkv(12, 1, 4, 2)
    layout, spec, plan = SequenceLayout.dense(1, 12), AttentionSpec("s2", 4), head_plan(0, 4, 4, 2, "upper_half")
    torch.testing.assert_close(
        attend(q, k, v, layout, spec, plan, 0.5), attend(q * 0.5 * 8**0.5, k, v, layout, spec, plan)
    )


def later_tokens_seen(spec: AttentionSpec, sequence: int = 16) -> int:
    """How many (query, later key) pairs have a nonzero gradient of the query's output, summed over channels."""
    q, k, v = random_qkv(sequence, 1, 4, 2)
    out = attend(q, k, v, SequenceLayout.dense(1, sequence), spec, head_plan(0, 4, 4, 2, spec.shifted_heads))
    seen = 0
    for position in range(sequence):
        grads = torch.autograd.grad(out[position].sum(), (k, v), retain_graph=True)
        touched = sum(grad.abs().sum((1, 2, 3)) for grad in grads)
        seen += int((touched[position + 1 :] != 0).sum())
    return seen


@pytest.mark.parametrize("rule", ["upper_half", "alternate"])
def test_no_output_depends_on_a_later_token_by_gradient(rule: str) -> None:
    assert later_tokens_seen(AttentionSpec("s2", 4, rule)) == 0
    assert later_tokens_seen(AttentionSpec("full", 4, rule)) == 0


def test_legacy_wrap_leaks_the_future_and_this_test_sees_it() -> None:
    # Each of the first G/2 tokens sees all G/2 tokens of the end.
    assert later_tokens_seen(AttentionSpec("s2", 4, legacy_wrap=True)) == 2 * 2


def test_perturbing_a_token_changes_nothing_before_it() -> None:
    plan = head_plan(0, 9, 9, 3, "upper_half")
    q, k, v = (tensor.detach() for tensor in random_qkv(21, 2, 9, 3))
    layout = SequenceLayout.dense(2, 21)
    before = attend(q, k, v, layout, AttentionSpec("s2", 6), plan)
    for position in range(21):
        moved = [tensor.clone() for tensor in (q, k, v)]
        for tensor in moved:
            tensor[position:] = torch.randn_like(tensor[position:])
        after = attend(*moved, layout, AttentionSpec("s2", 6), plan)
        assert torch.equal(after[:position], before[:position])
        assert not torch.equal(after[position], before[position])


def published_s2(q_SBHD: torch.Tensor, k_SBHD: torch.Tensor, v_SBHD: torch.Tensor, group: int) -> torch.Tensor:
    """The paper's pseudo-code (Algorithm 1): repeat K and V, roll upper heads, group, attend, roll back."""
    sequence, batch, heads, dim = q_SBHD.shape
    ratio = heads // k_SBHD.shape[2]

    def grouped(x_SBHD: torch.Tensor) -> torch.Tensor:
        x = x_SBHD.transpose(0, 1)
        x = torch.cat((x[:, :, : heads // 2], x[:, :, heads // 2 :].roll(-group // 2, 1)), 2)
        return x.reshape(batch * (sequence // group), group, heads, dim).transpose(1, 2)

    k, v = (tensor.repeat_interleave(ratio, 2) for tensor in (k_SBHD, v_SBHD))
    out = torch.nn.functional.scaled_dot_product_attention(grouped(q_SBHD), grouped(k), grouped(v), is_causal=True)
    out = out.transpose(1, 2).reshape(batch, sequence, heads, dim)
    out = torch.cat((out[:, :, : heads // 2], out[:, :, heads // 2 :].roll(group // 2, 1)), 2)
    return out.transpose(0, 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (9, 3), (5, 1)])
def test_legacy_wrap_is_the_published_code(heads: int, kv_heads: int) -> None:
    q, k, v = random_qkv(24, 2, heads, kv_heads)
    plan = head_plan(0, heads, heads, kv_heads, "upper_half")
    ours = attend(q, k, v, SequenceLayout.dense(2, 24), AttentionSpec("s2", 8, legacy_wrap=True), plan)
    theirs = published_s2(q, k, v, 8)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)
    # Without the wrap only the shifted heads' first and last half groups differ.
    clean = attend(q, k, v, SequenceLayout.dense(2, 24), AttentionSpec("s2", 8), plan)
    torch.testing.assert_close(clean[:, :, : heads // 2], ours[:, :, : heads // 2], atol=1e-12, rtol=0)
    torch.testing.assert_close(clean[4:], ours[4:], atol=1e-12, rtol=0)
    assert not torch.allclose(clean[:4, :, heads // 2 :], ours[:4, :, heads // 2 :])


def test_legacy_wrap_refuses_irregular_layouts() -> None:
    spec, plan = AttentionSpec("s2", 8, legacy_wrap=True), head_plan(0, 4, 4, 2, "upper_half")
    with pytest.raises(ConfigError, match="legacy_wrap"):
        attend(*random_qkv(20, 1, 4, 2), SequenceLayout.dense(1, 20), spec, plan)
    documents = SequenceLayout.build(1, 16, document_ids_BS=np.arange(16).reshape(1, 16) // 5)
    with pytest.raises(ConfigError, match="legacy_wrap"):
        attend(*random_qkv(16, 1, 4, 2), documents, spec, plan)


def test_the_papers_flash_path_at_8192() -> None:
    """Each of the flash path's segments, attended alone, is the corresponding slice of ours."""
    q, k, v = (tensor.detach() for tensor in random_qkv(8192, 1, 2, 2, dim=4, dtype=torch.float32))
    out = attend(q, k, v, SequenceLayout.dense(1, 8192), AttentionSpec("s2", 2048), head_plan(0, 2, 2, 2, "upper_half"))
    for head, lengths in ((0, [2048] * 4), (1, [1024, 2048, 2048, 2048, 1024])):
        edges = np.cumsum([0, *lengths]).tolist()
        assert segments(8192, 2048, bool(head)) == list(zip(edges, edges[1:], strict=False))
        for start, stop in zip(edges, edges[1:], strict=False):
            part = [tensor[start:stop, 0, head][None, None] for tensor in (q, k, v)]
            alone = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True)[0, 0]
            torch.testing.assert_close(out[start:stop, 0, head], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["s2", "full"])
def test_padding_side_changes_no_real_token(kind: str) -> None:
    """Left-, right- and unpadded rows give the same outputs and gradients; pads give exact zeros, even from NaN."""
    real, extra = 19, 6
    plan, spec = head_plan(0, 6, 6, 3, "upper_half"), AttentionSpec(kind, 8)
    bare = random_qkv(real, 1, 6, 3)
    weight = torch.randn(real, 1, 6, 8, dtype=torch.float64)
    expected = attend(*bare, SequenceLayout.dense(1, real), spec, plan)
    expected_grads = torch.autograd.grad((expected * weight).sum(), bare)
    for left in (0, 2, extra):
        place = slice(left, left + real)
        padded = [torch.full((real + extra, 1, t.shape[2], 8), float("nan"), dtype=torch.float64) for t in bare]
        for target, source in zip(padded, bare, strict=True):
            target[place] = source.detach()
            target.requires_grad_()
        mask = np.zeros((1, real + extra), bool)
        mask[0, place] = True
        out = attend(*padded, SequenceLayout.build(1, real + extra, mask), spec, plan)
        torch.testing.assert_close(out[place], expected, atol=1e-13, rtol=0)
        outside = torch.ones(real + extra, dtype=torch.bool)
        outside[place] = False
        assert torch.equal(out[outside], torch.zeros_like(out[outside]))
        weights = torch.randn_like(out)
        weights[place] = weight
        for grad, reference in zip(torch.autograd.grad((out * weights).sum(), padded), expected_grads, strict=True):
            torch.testing.assert_close(grad[place], reference, atol=1e-13, rtol=0)
            assert torch.equal(grad[outside], torch.zeros_like(grad[outside]))


def test_a_micro_batch_of_padding_alone_is_zero() -> None:
    layout = SequenceLayout.build(2, 6, np.zeros((2, 6), bool))
    out = attend(*random_qkv(6, 2, 4, 2), layout, AttentionSpec("s2", 4), head_plan(0, 4, 4, 2, "upper_half"))
    assert torch.equal(out, torch.zeros_like(out))


def spied(
    monkeypatch: pytest.MonkeyPatch, varlen: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Record what reaches the kernels."""
    real = select_backend("math", CPU, torch.float64, 8)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        seen.append((q, k, v))
        return real.dense(q, k, v, scale)

    def segment_loop(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, *rest: float
    ) -> torch.Tensor:
        seen.append((q, k, v))
        longest_q, longest_k, scale = rest
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        assert longest_q == longest_k == int(cu_q.diff().max())
        edges = cu_q.tolist()
        return torch.cat(
            [
                real.dense(q[None, a:b], k[None, a:b], v[None, a:b], scale)[0]
                for a, b in zip(edges, edges[1:], strict=False)
            ]
        )

    backend = Backend("spy", dense, segment_loop if varlen else None)
    monkeypatch.setattr(local, "select_backend", lambda *_: backend)
    return seen


def fused_qkv(sequence: int, batch: int, heads: int, kv_heads: int, dim: int = 8) -> tuple[torch.Tensor, ...]:
    """A fused projection's output and its q, k, v views, strides as in [S, B, (Hq + 2 Hkv) D]."""
    fused = torch.randn(sequence, batch, heads + 2 * kv_heads, dim, dtype=torch.float64)
    return fused, *fused.split([heads, kv_heads, kv_heads], dim=2)


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 8, 4), (3, 8, 2), (2, 4, 4)])
def test_kernels_get_views_and_each_key_once(
    monkeypatch: pytest.MonkeyPatch, irregular: bool, batch: int, heads: int, kv_heads: int
) -> None:
    seen = spied(monkeypatch, varlen=irregular)
    fused, q, k, v = fused_qkv(32, batch, heads, kv_heads)
    ids = np.arange(32)[None].repeat(batch, 0) // 7 if irregular else None
    layout = SequenceLayout.build(batch, 32, document_ids_BS=ids)
    attend(q, k, v, layout, AttentionSpec("s2", 8), head_plan(0, heads, heads, kv_heads, "upper_half"))
    storage = fused.untyped_storage().data_ptr()
    for tensors in seen:
        assert all(tensor.untyped_storage().data_ptr() == storage for tensor in tensors)
    elements = 32 * batch * kv_heads * 8
    assert sum(k.numel() for _, k, _ in seen) == sum(v.numel() for _, _, v in seen) == elements
    if batch == 1:
        assert len(seen) == (2 if irregular else 1 + 3), "one call, plus at most one for each odd edge segment"


def test_only_a_straddling_kv_head_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    _, q, k, v = fused_qkv(32, 1, 9, 3)
    attend(q, k, v, SequenceLayout.dense(1, 32), AttentionSpec("s2", 8), head_plan(0, 9, 9, 3, "upper_half"))
    assert sum(k.numel() for _, k, _ in seen) == 32 * (3 + 1) * 8


@pytest.mark.parametrize("kind", ["s2", "full"])
def test_packed_rows_equal_the_oracle(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The cu_seqlens path, with a plain loop standing in for the CUDA kernel."""
    spied(monkeypatch, varlen=True)
    q, k, v = random_qkv(26, 3, 9, 3)
    mask = np.ones((3, 26), bool)
    mask[0, :4] = mask[1, 20:] = False
    documents = np.arange(26)[None].repeat(3, 0) // np.array([[5], [7], [30]])
    out = attend(
        q,
        k,
        v,
        SequenceLayout.build(3, 26, mask, documents),
        AttentionSpec(kind, 8),
        head_plan(0, 9, 9, 3, "upper_half"),
    )
    group = 8 if kind == "s2" else None
    expected = oracle.attention(q, k, v, oracle.masks(3, 26, 9, 3, group, padding=mask, documents=documents))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(out)
    for left, right in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_queries_may_be_the_end_of_a_key_segment() -> None:
    """The seam of context parallelism: 5 local queries over 12 keys, of which the first 7 came from a predecessor."""
    q, k, v = (tensor.detach().transpose(0, 1) for tensor in random_qkv(12, 2, 4, 2))
    backend = select_backend("math", CPU, torch.float64, 8)
    whole = attend_block(q, k, v, Span(0, 2, 0, 12), Span(0, 2, 0, 12), backend, 0.3)
    tail = attend_block(q[:, 7:], k, v, Span(0, 2, 7, 5), Span(0, 2, 0, 12), backend, 0.3)
    torch.testing.assert_close(tail, whole[:, 7:], atol=1e-13, rtol=0)


def test_backends_the_cpu_lacks_are_errors() -> None:
    for name in ("cudnn", "flash", "flash_attn"):
        with pytest.raises(ConfigError, match=f"attention.backend: {name} needs a CUDA device"):
            select_backend(name, CPU, torch.float32, 64)
    with pytest.raises(ConfigError, match="is not one of"):
        select_backend("fast", CPU, torch.float32, 64)


def test_shapes_that_contradict_the_layout_are_errors() -> None:
    plan, spec = head_plan(0, 4, 4, 2, "upper_half"), AttentionSpec("s2", 4)
    with pytest.raises(ValueError, match="do not fit"):
        attend(*random_qkv(8, 1, 4, 2), SequenceLayout.dense(1, 9), spec, plan)
    with pytest.raises(ValueError, match="do not fit"):
        attend(*random_qkv(8, 1, 4, 4), SequenceLayout.dense(1, 8), spec, plan)
