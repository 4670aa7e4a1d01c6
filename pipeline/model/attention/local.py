"""S²-Attn (LongLoRA, arXiv 2309.12307, section 3.2) on views: no roll, no wrap, no repeated K or V.

Shape suffixes: S tokens, B batch rows, H heads (query or KV), D head dim. A *call* is one block of heads on one span of
tokens; `attend` lists the calls, hands each its views of q, k and v, and writes each result once into the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from parallel.errors import ConfigError
from pipeline.model.attention.backends import Backend, attend_pieces, expand_groups, select_backend
from pipeline.model.layers.recipe import Recipe, give_recipe
from pipeline.planning.attention_layout import AttentionSpec, HeadBlock, HeadPlan, SequenceLayout, Span


class Window(NamedTuple):
    """A rectangle of an [S, B, H, D] tensor that one call reads or writes."""

    span: Span
    head_start: int
    head_stop: int

    def of(self, x_SBHD: torch.Tensor) -> torch.Tensor:
        """Its view [segments, tokens, heads, D]; never a copy, whatever the strides."""
        span = self.span
        if span.count == 1:
            tokens = slice(span.start, span.start + (span.length - 1) * span.step + 1, span.step)
            rows = x_SBHD[tokens, span.row_start : span.row_stop]
            return rows[:, :, self.head_start : self.head_stop].transpose(0, 1)
        row = x_SBHD[span.start : span.start + span.length * span.count, span.row_start]
        return row[:, self.head_start : self.head_stop].unflatten(0, (span.count, span.length))


class TakeWindows(torch.autograd.Function):
    """Windows of one tensor as views.

    Plain slicing would make autograd allocate and add one full-size zero-padded gradient a window; here each window's
    gradient is written once into a single buffer (added, where KV heads are shared or positions are padding).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, windows: list[Window], disjoint: bool) -> tuple[torch.Tensor, ...]:
        ctx.windows, ctx.disjoint, ctx.shape = windows, disjoint, x.shape
        return tuple(window.of(x) for window in windows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather_windows(grads[0], ctx.shape, ctx.windows, grads, ctx.disjoint), None, None


def gather_windows(
    like: torch.Tensor,
    shape: torch.Size,
    windows: Sequence[Window],
    parts: Sequence[torch.Tensor],
    disjoint: bool,
    covers: bool = True,
) -> torch.Tensor:
    """A tensor of `shape` and the dtype and device of `like` that holds `parts` at `windows`.

    `disjoint` promises that the windows do not overlap, otherwise overlaps add; `covers`, that disjoint ones leave
    nothing out. The rest is 0.
    """
    whole = like.new_empty(shape) if disjoint and covers else like.new_zeros(shape)
    for window, part in zip(windows, parts, strict=True):
        if disjoint:
            _copy(window.of(whole), part)
        else:
            window.of(whole).add_(part)
    return whole


_WIDE = torch.complex128
"""What is copied as it lies is copied 16 bytes at a time: torch's kernel for strided tensors takes values one by one,
in twice the time (H200, 32 MiB; of 4 MiB it makes no difference)."""
_MUCH = 1 << 23
"""Bytes from which on."""


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)` of equal shapes."""
    if target.nbytes >= _MUCH and target.dtype == source.dtype and _is_wide(target) and _is_wide(source):
        target, source = target.view(_WIDE), source.view(_WIDE)
    target.copy_(source)


def _is_wide(x: torch.Tensor) -> bool:
    """Whether `x.view(_WIDE)` is possible: rows of the last axis are whole 16-byte words."""
    *strides, last = x.stride()
    return last == 1 and not any(
        count * x.element_size() % _WIDE.itemsize for count in (*strides, x.storage_offset(), x.shape[-1])
    )


class PlaceWindows(torch.autograd.Function):
    """Disjoint windows into one output; positions no window covers are 0. The gradients handed back are views."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, windows: list[Window], covers: bool, *parts: torch.Tensor) -> torch.Tensor:
        ctx.windows = windows
        return gather_windows(parts[0], shape, windows, parts, True, covers)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, None, *(window.of(grad) for window in ctx.windows))


def attend(
    q_SBHD: torch.Tensor,
    k_SBHD: torch.Tensor,
    v_SBHD: torch.Tensor,
    layout: SequenceLayout,
    spec: AttentionSpec,
    plan: HeadPlan,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """S² or full causal attention of one rank's heads.

    q [S, B, Hq, D], k and v [S, B, Hkv, D], RoPE applied, any strides with a contiguous last axis; returns contiguous
    [S, B, Hq, D] in q's dtype. Padded positions give exactly 0 and get zero gradient. `softmax_scale` None: 1/sqrt(D).
    Raises ConfigError for a backend the device lacks and for `legacy_wrap` on an irregular layout; ValueError for
    shapes that contradict the layout or the plan.
    """
    blocks = plan.blocks if spec.kind == "s2" else plan.full_blocks
    sizes = (layout.sequence, layout.batch)
    if q_SBHD.shape[:3] != (*sizes, blocks[-1].q_stop) or k_SBHD.shape[:3] != (*sizes, blocks[-1].kv_stop):
        raise ValueError(
            f"q {tuple(q_SBHD.shape)} and k {tuple(k_SBHD.shape)} do not fit layout [S, B] = {sizes} with "
            f"{blocks[-1].q_stop} query and {blocks[-1].kv_stop} KV heads."
        )
    head_dim = q_SBHD.shape[-1]
    backend = select_backend(spec.backend, q_SBHD.device, q_SBHD.dtype, head_dim)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if spec.kind == "s2" and spec.legacy_wrap:
        return _attend_rolled(q_SBHD, k_SBHD, v_SBHD, layout, spec.group, blocks, backend, scale)
    group = spec.group if spec.kind == "s2" else None
    packed = backend.varlen is not None and spec.window is None

    def spans(block: HeadBlock) -> tuple[Span, ...]:
        if group is not None and block.shifted and spec.dilation > 1:
            return layout.dilated_spans(group, spec.dilation)
        return layout.spans(group, block.shifted, packed)

    calls = [(block, span) for block in blocks for span in spans(block)]
    if not calls:  # nothing but padding
        return q_SBHD.new_zeros(q_SBHD.shape)
    covers = not layout.padded
    reuses_kv = HeadPlan.reuses_kv(blocks)
    q_windows = [Window(span, block.q_start, block.q_stop) for block, span in calls]
    kv_windows = [Window(span, block.kv_start, block.kv_stop) for block, span in calls]
    queries = TakeWindows.apply(q_SBHD, q_windows, covers)
    keys = TakeWindows.apply(k_SBHD, kv_windows, covers and not reuses_kv)
    values = TakeWindows.apply(v_SBHD, kv_windows, covers and not reuses_kv)
    parts = [
        attend_block(q, k, v, span, span, backend, scale)
        if spec.window is None
        else attend_window(q, k, v, spec.window, backend, scale)
        for q, k, v, (_, span) in zip(queries, keys, values, calls, strict=True)
    ]
    out: torch.Tensor = PlaceWindows.apply(q_SBHD.shape, q_windows, covers, *parts)
    give_recipe(out, placed_recipe(parts, q_SBHD.shape, q_windows, covers))
    return out


def _placed(
    parts: Sequence[torch.Tensor], start: int, stop: int, shape: torch.Size, windows: Sequence[Window], covers: bool
) -> torch.Tensor:
    return gather_windows(parts[0], shape, windows, parts, True, covers)[start:stop]


def placed_recipe(
    parts: Sequence[torch.Tensor], shape: torch.Size, windows: Sequence[Window], covers: bool
) -> Recipe | None:
    """How attention's output [S, B, H, D] is put together of what its kernels returned, and keep; None: no parts."""
    if not parts:
        return None
    sources = tuple(part.detach() for part in parts)
    return Recipe(sources, partial(_placed, shape=shape, windows=tuple(windows), covers=covers))


def attend_block(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    q_span: Span,
    kv_span: Span,
    backend: Backend,
    scale: float,
) -> torch.Tensor:
    """One call: each query segment attends causally to its KV segment, whose last tokens it is (aligned bottom-right).

    q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D]: B equal segments, or one row cut at the spans' edges. Sk > Sq where the
    keys start earlier than the local queries, as they do for the first group of a context-parallel shard.
    """
    if q_span.edges is not None and kv_span.edges is not None:
        assert backend.varlen is not None, "packed spans are only made for backends with varlen"
        device = q_BSHD.device
        out = backend.varlen(
            q_BSHD[0],
            k_BSHD[0],
            v_BSHD[0],
            _edges_on(q_span, device),
            _edges_on(kv_span, device),
            q_span.longest,
            kv_span.longest,
            scale,
        )
        return out.unsqueeze(0)
    queries, keys = q_BSHD.shape[1], k_BSHD.shape[1]
    if queries == keys:
        return backend.dense(q_BSHD, k_BSHD, v_BSHD, scale)
    # SDPA's is_causal is aligned top-left for unequal lengths, so the mask is given.
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BSHD.device).tril(keys - queries)
    return _masked(q_BSHD, k_BSHD, v_BSHD, mask, scale)


def attend_window(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, window: int, backend: Backend, scale: float
) -> torch.Tensor:
    """Causal attention in B equal segments in which a query sees `window` keys, its own among them.

    q [B, S, Hq, D], k and v [B, S, Hkv, D] -> [B, S, Hq, D]. A window's queries at a time, and the keys that any of
    them sees: two windows of keys at most.
    """
    tokens = q_BSHD.shape[1]
    if tokens <= window:
        return backend.dense(q_BSHD, k_BSHD, v_BSHD, scale)
    at = torch.arange(tokens, device=q_BSHD.device)
    parts = []
    for start in range(0, tokens, window):
        stop, first = min(start + window, tokens), max(0, start - window + 1)
        before = at[start:stop, None] - at[first:stop]
        mask = (before >= 0) & (before < window)
        parts.append(_masked(q_BSHD[:, start:stop], k_BSHD[:, first:stop], v_BSHD[:, first:stop], mask, scale))
    return torch.cat(parts, dim=1)


def _masked(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention where `mask` [Sq, Sk] says; [B, Sq, Hq, D]."""
    if q_BSHD.is_cuda:
        # The memory-efficient kernel, here for fp32, has no GQA: asked for it, torch would hold all scores instead.
        k_BSHD, v_BSHD = expand_groups(q_BSHD, k_BSHD, v_BSHD)
    out_BHSD = F.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q_BSHD.shape[2] != k_BSHD.shape[2],
    )
    return out_BHSD.transpose(1, 2)


def attend_straddling(
    q_BSHD: torch.Tensor,
    early_k_BTHD: torch.Tensor,
    early_v_BTHD: torch.Tensor,
    own_k_BSHD: torch.Tensor,
    own_v_BSHD: torch.Tensor,
    backend: Backend,
    scale: float,
    fused: bool = True,
) -> torch.Tensor:
    """B equal segments whose first T keys lie in another tensor than the last Sq, which are the queries' own.

    q [B, Sq, Hq, D], early k and v [B, T, Hkv, D] with T >= 1, own k and v [B, Sq, Hkv, D] -> [B, Sq, Hq, D]. In half
    precision on CUDA no mask is ever made: two kernels merged by their log-sum-exps, or else varlen over joined keys.
    """
    heads_first = [x.transpose(1, 2) for x in (q_BSHD, early_k_BTHD, own_k_BSHD)]
    for kernel in backend.lse:
        q, early_k, own_k = heads_first
        if kernel.runs(q, early_k, False) and kernel.runs(q, own_k, True):
            return attend_pieces(q_BSHD, early_k_BTHD, early_v_BTHD, own_k_BSHD, own_v_BSHD, kernel, scale, fused)
    k_BSHD = torch.cat((early_k_BTHD, own_k_BSHD), dim=1)
    v_BSHD = torch.cat((early_v_BTHD, own_v_BSHD), dim=1)
    segments, queries = q_BSHD.shape[:2]
    keys = k_BSHD.shape[1]
    if backend.varlen is None:
        q_span, kv_span = Span(0, segments, 0, queries), Span(0, segments, 0, keys)
        return attend_block(q_BSHD, k_BSHD, v_BSHD, q_span, kv_span, backend, scale)
    counts = torch.arange(segments + 1, dtype=torch.int32, device=q_BSHD.device)
    packed = [x.flatten(0, 1) for x in (q_BSHD, k_BSHD, v_BSHD)]
    return backend.varlen(*packed, counts * queries, counts * keys, queries, keys, scale).unflatten(
        0, (segments, queries)
    )


def _edges_on(span: Span, device: torch.device) -> torch.Tensor:
    """The span's edges as int32 cu_seqlens; one copy to a device for all layers, not waited for."""
    if device not in span.memo:
        edges = torch.tensor(span.edges, dtype=torch.int32)
        if device.type == "cuda":
            edges = edges.pin_memory().to(device, non_blocking=True)
        span.memo[device] = edges
    return span.memo[device]


def _attend_rolled(
    q_SBHD: torch.Tensor,
    k_SBHD: torch.Tensor,
    v_SBHD: torch.Tensor,
    layout: SequenceLayout,
    group: int,
    blocks: tuple[HeadBlock, ...],
    backend: Backend,
    scale: float,
) -> torch.Tensor:
    """The published S²: shifted heads rolled by -G/2, grouped, rolled back. The first G/2 tokens see the last G/2."""
    if not layout.is_dense or layout.sequence % group:
        raise ConfigError(
            f"attention.legacy_wrap: needs unpadded single-document rows of a multiple of {group} tokens, "
            f"got {layout.sequence}; switch it off."
        )
    outputs = []
    for block in blocks:
        shift = group // 2 if block.shifted else 0
        q = q_SBHD[:, :, block.q_start : block.q_stop].roll(-shift, 0)
        k = k_SBHD[:, :, block.kv_start : block.kv_stop].roll(-shift, 0)
        v = v_SBHD[:, :, block.kv_start : block.kv_stop].roll(-shift, 0)
        spans = layout.spans(group, False, False)
        q_windows = [Window(span, 0, q.shape[2]) for span in spans]
        kv_windows = [Window(span, 0, k.shape[2]) for span in spans]
        parts = [
            attend_block(q_window.of(q), kv_window.of(k), kv_window.of(v), span, span, backend, scale)
            for span, q_window, kv_window in zip(spans, q_windows, kv_windows, strict=True)
        ]
        outputs.append(PlaceWindows.apply(q.shape, q_windows, True, *parts).roll(shift, 0))
    return torch.cat(outputs, dim=2)
