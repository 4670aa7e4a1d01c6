"""Which tokens and heads of S²-Attn go into which attention call (LongLoRA, arXiv 2309.12307, section 3.2); no torch.

Two independent questions: `head_plan` says which local heads are shifted, `SequenceLayout.spans` says which token
ranges attend among themselves. An attention call is one block of heads on one span, and both are plain slices, so the
tensors reach the kernel as views.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from parallel.axes import query_plan
from parallel.errors import ConfigError, DataError
from pipeline.config.sections import AttentionConfig

SHIFT_RULES = ("upper_half", "alternate", "none", "all", "odd_layers")
KINDS = ("s2", "full")


@dataclass(frozen=True)
class AttentionSpec:
    """What attention a forward pass uses."""

    kind: str
    """s2 | full (causal over the document)."""
    group: int
    """Group length G in tokens, even, >= 2; unused by `full`."""
    shifted_heads: str = "upper_half"
    """upper_half | alternate | none | all | odd_layers, as `head_plan` explains."""
    legacy_wrap: bool = False
    """Reproduce the published roll, which leaks the future; parity studies only."""
    backend: str = "auto"
    """attention.backend."""
    kernels: bool = True
    """Merge attention over a halo and over own keys in one kernel, where there is one (train.without: kernels)."""
    window: int | None = None
    """Of `full`: keys that a query sees, its own among them (a sliding window); None: all before it."""
    dilation: int = 1
    """Of `s2`, above 1: heads that would be shifted see every so many-th token of segments of `dilation` groups
    instead."""
    lend_from: int | None = query_plan.LEND_FROM
    """Of `full` over context shards: keys that the busiest rank must save a query that moves; None: none moves."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"attention.kind: {self.kind!r} is not one of {', '.join(KINDS)}.")
        if self.shifted_heads not in SHIFT_RULES:
            raise ConfigError(
                f"attention.shifted_heads: {self.shifted_heads!r} is not one of {', '.join(SHIFT_RULES)}."
            )
        _check_group(self.group)


@dataclass(frozen=True)
class HeadBlock:
    """Adjacent local query heads and the local KV heads they read: one GQA call on slices."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    shifted: bool


@dataclass(frozen=True)
class HeadPlan:
    """The blocks of one rank's heads, in head order."""

    blocks: tuple[HeadBlock, ...]
    """Split by shift, for S²."""
    full_blocks: tuple[HeadBlock, ...]
    """Not split by shift, for full attention; more than one only where a rank's slice cuts a KV group."""

    @staticmethod
    def reuses_kv(blocks: tuple[HeadBlock, ...]) -> bool:
        """Whether some KV head is read by two blocks, so that its gradients must be added."""
        return any(before.kv_stop > after.kv_start for before, after in zip(blocks, blocks[1:], strict=False))


def layer_rule(rule: str, layer: int) -> str:
    """The rule of one layer, which is numbered from 0 in the whole model."""
    return rule if rule != "odd_layers" else ("none", "all")[layer % 2]


def head_plan(
    first_query_head: int, local_query_heads: int, total_query_heads: int, total_kv_heads: int, rule: str
) -> HeadPlan:
    """Blocks of the query heads [first, first + local) of a layer; each head's shift follows its global index only.

    upper_half: heads h < H // 2 are unshifted, as in the paper's code (`num_heads // 2`): 4 of 9 heads.
    alternate: the query heads of odd KV groups are shifted (with one KV head, none is).
    none, all: no head is, or each: rows of the paper's tables 1 and 6, for studies.
    odd_layers: likewise; here as in an odd layer, where all are (`layer_rule`).
    Local KV heads are counted from the first one the slice reads. Raises ConfigError for impossible head counts.
    """
    if rule not in SHIFT_RULES:
        raise ConfigError(f"attention.shifted_heads: {rule!r} is not one of {', '.join(SHIFT_RULES)}.")
    if total_kv_heads < 1 or total_query_heads % total_kv_heads:
        raise ConfigError(
            f"The model's {total_query_heads} query heads are not a multiple of its {total_kv_heads} KV heads."
        )
    stop = first_query_head + local_query_heads
    if first_query_head < 0 or local_query_heads < 1 or stop > total_query_heads:
        raise ConfigError(
            f"Query heads [{first_query_head}, {stop}) do not lie within the model's {total_query_heads}."
        )
    ratio = total_query_heads // total_kv_heads

    def is_shifted(head: int) -> bool:
        if rule in ("none", "all", "odd_layers"):
            return rule != "none"
        return head >= total_query_heads // 2 if rule == "upper_half" else (head // ratio) % 2 == 1

    heads = range(first_query_head, stop)
    return HeadPlan(tuple(_blocks(heads, ratio, is_shifted)), tuple(_blocks(heads, ratio, lambda head: False)))


def _blocks(heads: range, ratio: int, is_shifted: Callable[[int], bool]) -> Iterator[HeadBlock]:
    first_kv = heads.start // ratio
    # Heads of one KV group with one shift stay together; a whole group may then join its equally shifted neighbours.
    parts = [list(part) for _, part in groupby(heads, key=lambda head: (head // ratio, is_shifted(head)))]

    def joins(part: list[int]) -> tuple[bool, int]:
        return is_shifted(part[0]), -1 if len(part) == ratio else part[0]

    for (shifted, _), joined in groupby(parts, key=joins):
        run = [head for part in joined for head in part]
        yield HeadBlock(
            run[0] - heads.start,
            run[-1] + 1 - heads.start,
            run[0] // ratio - first_kv,
            run[-1] // ratio + 1 - first_kv,
            shifted,
        )


def _check_group(group: int) -> None:
    if group < 2 or group % 2:
        raise ConfigError(
            f"attention.group_size: {group} must be even and at least 2, since heads shift by half of it."
        )


def segments(sequence: int, group: int, shifted: bool) -> list[tuple[int, int]]:
    """Token ranges that attend among themselves in a sequence of N >= 1 tokens.

    Unshifted: [0, G) [G, 2G) ...; shifted: [0, G/2) [G/2, 3G/2) ...; the last ends at N. Nothing wraps.
    """
    _check_group(group)
    inner = range(group // 2 if shifted else group, sequence, group)
    edges = [0, *inner, sequence]
    return list(zip(edges, edges[1:], strict=False))


@dataclass(frozen=True)
class Span:
    """The token side of one attention call: equal segments that one view covers, or a row of unequal ones.

    Either rows [row_start, row_stop) each hold one segment [start, start + length), or one row holds `count` adjacent
    segments of `length`, or (with `edges`) one row's [start, start + length) is cut at `edges`, relative to `start`.
    """

    row_start: int
    row_stop: int
    start: int
    length: int
    count: int = 1
    edges: tuple[int, ...] | None = None
    step: int = 1
    """Above 1, in each row alone every step-th token from `start` on, `length` of them."""
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Device copies of `edges`; kept here so that all layers share them."""

    @property
    def longest(self) -> int:
        """Tokens in the longest segment."""
        if self.edges is None:
            return self.length
        return max(stop - start for start, stop in zip(self.edges, self.edges[1:], strict=False))


@dataclass(frozen=True)
class Straddle:
    """A segment that began before a context-parallel shard: rows [row_start, row_stop) each have one, alike.

    Its queries are the shard's `length` tokens from its number `at` on, its keys the tokens from `start` on.
    """

    row_start: int
    row_stop: int
    start: int
    """Token of the whole sequence at which the segment begins."""
    length: int
    at: int = 0


@dataclass(frozen=True)
class SequenceLayout:
    """Where the real tokens and documents of one micro-batch [B, S] lie; made once, shared by all layers.

    Group edges count from each row's first real token, so padding changes no real token's output.
    """

    batch: int
    sequence: int
    rows: tuple[tuple[int, ...], ...] | None = None
    """Document edges of each row, first real token to last plus one (empty: all padding); None: dense, every row one
    document."""
    _memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def dense(cls, batch: int, sequence: int) -> SequenceLayout:
        """No padding, one document a row."""
        return cls(batch, sequence)

    @classmethod
    def build(
        cls, batch: int, sequence: int, padding_mask_BS: Any | None = None, document_ids_BS: Any | None = None
    ) -> SequenceLayout:
        """From a bool mask [B, S] (True: real token, one run a row) and integer ids [B, S] (new value, new document).

        Arrays may be numpy or torch (a CUDA tensor costs one synchronization). Raises DataError for a wrong shape or a
        row whose real tokens are not one run.
        """
        if padding_mask_BS is None and document_ids_BS is None:
            return cls.dense(batch, sequence)
        shape = (batch, sequence)
        mask = np.ones(shape, bool) if padding_mask_BS is None else _host("padding mask", padding_mask_BS, shape)
        mask = mask.astype(bool)
        ids = np.zeros(shape, np.int64) if document_ids_BS is None else _host("document ids", document_ids_BS, shape)
        rows = tuple(_row_edges(row, mask[row], ids[row]) for row in range(batch))
        if all(edges == (0, sequence) for edges in rows):
            return cls.dense(batch, sequence)
        return cls(batch, sequence, rows)

    @property
    def is_dense(self) -> bool:
        """Every row is one document of S real tokens."""
        return self.rows is None

    @property
    def padded(self) -> bool:
        """Some position holds no real token."""
        return self.rows is not None and any(not row or (row[0], row[-1]) != (0, self.sequence) for row in self.rows)

    def segments(self, group: int | None, shifted: bool = False) -> tuple[tuple[int, int, int], ...]:
        """(row, start, end) of every segment in order; `group` None: whole documents (full attention)."""
        key = ("segments", group, shifted)
        if key not in self._memo:
            rows = self.rows or ((0, self.sequence),) * self.batch
            self._memo[key] = tuple(
                (row, start, stop) for row, edges in enumerate(rows) for start, stop in _cut(edges, group, shifted)
            )
        return self._memo[key]

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, computed once for this layout and `key`."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def spans(self, group: int | None, shifted: bool, packed: bool) -> tuple[Span, ...]:
        """The segments as few calls: adjacent equal ones as one view, or (`packed`, irregular rows) a row at a time."""
        return self.remember(
            ("spans", group, shifted, packed), lambda: self._as_spans(self.segments(group, shifted), packed)
        )

    def _as_spans(self, cuts: tuple[tuple[int, int, int], ...], packed: bool) -> tuple[Span, ...]:
        if self.rows is None:
            return tuple(_dense_spans(self.batch, [(start, stop) for row, start, stop in cuts if row == 0]))
        return tuple(
            span
            for row, row_cuts in groupby(cuts, key=lambda cut: cut[0])
            for span in _row_spans(row, [(start, stop) for _, start, stop in row_cuts], packed)
        )

    def dilated_spans(self, group: int, dilation: int) -> tuple[Span, ...]:
        """Segments of `dilation` groups, each cut into `dilation` spans of every dilation-th token."""

        def make() -> tuple[Span, ...]:
            spans = []
            for whole in self.spans(group * dilation, False, False):
                for index in range(whole.count):
                    start = whole.start + index * whole.length
                    for first in range(min(dilation, whole.length)):
                        length = -(-(whole.length - first) // dilation)
                        spans.append(Span(whole.row_start, whole.row_stop, start + first, length, step=dilation))
            return tuple(spans)

        return self.remember(("dilated", group, dilation), make)

    def shard_spans(
        self, group: int | None, shifted: bool, packed: bool, first: int, last: int
    ) -> tuple[tuple[Span, ...], tuple[Straddle, ...]]:
        """What a shard of tokens [first, last) attends: segments that begin in it, and those that began before it.

        The spans count tokens from the shard's first; segments are cut at `last`, since later keys are never seen.
        """

        def make() -> tuple[tuple[Span, ...], tuple[Straddle, ...]]:
            inside, straddles, cuts = [], [], self.segments(group, shifted)
            for row in range(self.batch):
                # A long sequence has many shards, and each few of its segments.
                low = max(0, bisect_right(cuts, (row, first, self.sequence)) - 1)
                for of, start, stop in cuts[low : bisect_left(cuts, (row, last))]:
                    if of == row and first <= start:
                        inside.append((row, start - first, min(stop, last) - first))
                    elif of == row and first < stop:
                        straddles.append((row, start, min(stop, last) - first))
            return self._as_spans(tuple(inside), packed), tuple(_join_rows(straddles))

        return self.remember(("shard", group, shifted, packed, first, last), make)

    def fills(self, first: int, last: int) -> bool:
        """Whether every row holds real tokens at all of [first, last)."""
        return self.rows is None or all(bool(row) and row[0] <= first and last <= row[-1] for row in self.rows)


def _host(name: str, values: Any, shape: tuple[int, int]) -> np.ndarray:
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.shape != shape:
        raise DataError(f"The {name} has shape {array.shape}, but the micro-batch is {shape}.")
    return array


def _row_edges(row: int, real: np.ndarray, ids: np.ndarray) -> tuple[int, ...]:
    places = np.flatnonzero(real)
    if not len(places):
        return ()
    first, last = int(places[0]), int(places[-1]) + 1
    if last - first != len(places):
        raise DataError(f"Row {row} has padding between real tokens; pad on the left or the right only.")
    changes = np.flatnonzero(np.diff(ids[first:last])) + first + 1
    return (first, *changes.tolist(), last)


def _cut(edges: tuple[int, ...], group: int | None, shifted: bool) -> list[tuple[int, int]]:
    """Segments of a row: cut at document edges and at group edges counted from its first real token."""
    if not edges:
        return []
    cuts = set(edges)
    if group is not None:
        cuts.update(edges[0] + start for start, _ in segments(edges[-1] - edges[0], group, shifted))
    return list(pairwise(sorted(cuts)))


def _runs(cuts: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(start, length, count) of adjacent segments of one length."""
    for length, run in groupby(cuts, key=lambda cut: cut[1] - cut[0]):
        members = list(run)
        yield members[0][0], length, len(members)


def _join_rows(straddles: list[tuple[int, int, int]]) -> Iterator[Straddle]:
    """(row, start, length) of rising rows; adjacent rows alike become one."""
    # Adjacent rows keep the difference to their place in the list.
    ordered = enumerate(straddles)
    for (_, start, length), run in groupby(ordered, key=lambda item: (item[1][0] - item[0], *item[1][1:])):
        rows = [row for _, (row, _, _) in run]
        yield Straddle(rows[0], rows[-1] + 1, start, length)


def _dense_spans(batch: int, cuts: list[tuple[int, int]]) -> Iterator[Span]:
    for start, length, count in _runs(cuts):
        # In [S, B, ...] memory rows and groups cannot both be one axis of a view: loop over the fewer.
        if batch <= count and count > 1:
            yield from (Span(row, row + 1, start, length, count) for row in range(batch))
        else:
            yield from (Span(0, batch, start + index * length, length) for index in range(count))


def _row_spans(row: int, cuts: list[tuple[int, int]], packed: bool) -> Iterator[Span]:
    runs = list(_runs(cuts))
    if packed and len(runs) > 1:
        first = cuts[0][0]
        edges = (0, *(stop - first for _, stop in cuts))
        yield Span(row, row + 1, first, edges[-1], edges=edges)
    else:
        yield from (Span(row, row + 1, *run) for run in runs)


def attention_spec(attention: AttentionConfig, group: int) -> AttentionSpec:
    """The training attention a configuration asks for."""
    shifted, wrap, backend = attention.shifted_heads, attention.legacy_wrap, attention.backend
    return AttentionSpec(attention.kind, group, shifted, wrap, backend, dilation=attention.dilation)


def full_attention(attention: AttentionConfig) -> AttentionSpec:
    """Dense causal attention with the configured backend: what evaluation and inference always use."""
    return AttentionSpec("full", 2, attention.shifted_heads, False, attention.backend)
