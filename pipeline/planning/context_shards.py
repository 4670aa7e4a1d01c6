"""What each context-parallel rank needs of earlier ranks' K and V, how many bytes that is, and how the work is spread.

Pure functions of (global layout, attention, heads, shards), the same on every rank and remembered by the layout; no
torch. A rank's first segment of each kind of heads may begin before its shard: the keys from there to the shard's start
are its *halo*. It always ends at the shard's start, so where a KV head is read by unshifted and shifted heads the two
halos nest and the longer one is all that is sent. Under full attention ranks get all keys, and the work is evened out
by moving queries (`parallel.axes.query_plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, pairwise

import numpy as np

from parallel.axes import query_plan
from parallel.axes.halo_plan import HaloPlan, Region, equal_edges, plan_halos
from parallel.axes.query_plan import QueryPlan, plan_queries
from parallel.world.grid import GridPlan
from pipeline.planning.attention_layout import (
    AttentionSpec,
    HeadBlock,
    HeadPlan,
    SequenceLayout,
    Span,
    Straddle,
    head_plan,
)

HALOS = 64
"""Context ranks up to which halos are counted message by message; beyond, by the longest there can be."""


@dataclass(frozen=True)
class ShardWork:
    """One rank's attention calls under context parallelism."""

    local: tuple[tuple[HeadBlock, Span], ...]
    """Segments that begin in the shard; tokens counted from its first."""
    straddling: tuple[tuple[HeadBlock, Straddle], ...]
    """Segments that began before it."""
    reads: tuple[Region, ...]
    """For each of `straddling`, the earlier K and V it reads."""
    fills: bool
    """The shard holds no padding, so the calls write every position."""


def blocks_of(spec: AttentionSpec, heads: HeadPlan) -> tuple[HeadBlock, ...]:
    """The head blocks this kind of attention uses."""
    return heads.blocks if spec.kind == "s2" else heads.full_blocks


def shard_work(
    layout: SequenceLayout, spec: AttentionSpec, heads: HeadPlan, first: int, last: int, packed: bool
) -> ShardWork:
    """The calls of whoever holds tokens [first, last); `packed` as in `SequenceLayout.spans`."""
    group = spec.group if spec.kind == "s2" else None
    blocks = blocks_of(spec, heads)

    def make() -> ShardWork:
        local: list[tuple[HeadBlock, Span]] = []
        straddling: list[tuple[HeadBlock, Straddle]] = []
        reads: list[Region] = []
        for block in blocks:
            spans, straddles = layout.shard_spans(group, block.shifted, packed, first, last)
            local.extend((block, span) for span in spans)
            straddling.extend((block, straddle) for straddle in straddles)
            reads.extend(
                Region(s.row_start, s.row_stop, block.kv_start, block.kv_stop, s.start, first) for s in straddles
            )
        return ShardWork(tuple(local), tuple(straddling), tuple(reads), layout.fills(first, last))

    return layout.remember(("shard work", group, blocks, first, last, packed), make)


def query_moves(layout: SequenceLayout, spec: AttentionSpec, size: int, tokens: int, offset: int = 0) -> QueryPlan:
    """Which queries of full attention another rank attends than the one that holds them; the same for all heads.

    Args:
        layout: of the global sequence.
        size: shards.
        tokens: of each.
        offset: first token of the first shard, in a chunk of a sequence.

    Returns:
        No moves under S², where `spec` switches them off, and where they save too little.
    """
    least = spec.lend_from
    if spec.kind != "full" or size == 1 or least is None:
        return QueryPlan()

    if layout.batch == 1 and layout.is_dense:
        return _dense_moves(layout.sequence, least, size, tokens, offset)
    key = "query plan", least, size, tokens, offset
    return layout.remember(key, lambda: _moves(layout, least, size, tokens, offset))


@cache
def _dense_moves(sequence: int, least: int, size: int, tokens: int, offset: int) -> QueryPlan:
    """The planner asks for the same under every number of tensor-parallel ranks, and a long sequence takes a while."""
    return _moves(SequenceLayout.dense(1, sequence), least, size, tokens, offset)


def _moves(layout: SequenceLayout, least: int, size: int, tokens: int, offset: int) -> QueryPlan:
    last, work = offset + size * tokens, np.zeros(size * tokens, np.int64)
    for _, start, stop in layout.segments(None):
        low, high = max(start, offset), min(stop, last)
        if low < high:
            work[low - offset : high - offset] += np.arange(low - start + 1, high - start + 1)
    plan = plan_queries(work, size, offset)
    totals = work.reshape(size, tokens).sum(1)
    saved = int(totals.max())
    for move in plan.moves:
        given = work[move.start - offset : move.stop - offset].sum()
        totals[move.owner] -= given
        totals[move.worker] += given
    saved -= int(totals.max())
    return plan if saved >= least * plan.most() * layout.batch else QueryPlan()


def attended(
    layout: SequenceLayout,
    spec: AttentionSpec,
    heads: HeadPlan,
    moves: QueryPlan,
    rank: int,
    first: int,
    last: int,
    packed: bool,
) -> tuple[ShardWork, tuple[ShardWork, ...]]:
    """The calls of context rank `rank`, who holds tokens [first, last): of its own queries, and of each move to it.

    The latter are those of a shard that has the move's tokens alone.
    """

    def make() -> tuple[ShardWork, tuple[ShardWork, ...]]:
        kept = [
            (start - first, shard_work(layout, spec, heads, start, stop, packed))
            for start, stop in moves.kept(rank, first, last)
        ]
        if not moves.lent(rank):
            ((_, own),) = kept
        else:
            own = ShardWork(
                tuple((block, replace(span, start=span.start + at)) for at, part in kept for block, span in part.local),
                tuple((block, replace(segment, at=at)) for at, part in kept for block, segment in part.straddling),
                tuple(read for _, part in kept for read in part.reads),
                all(part.fills for _, part in kept),
            )
        others = (shard_work(layout, spec, heads, move.start, move.stop, packed) for move in moves.borrowed(rank))
        return own, tuple(others)

    return layout.remember(("attended", moves, spec.kind, spec.group, heads, rank, first, last, packed), make)


def halo_needs(
    layout: SequenceLayout, spec: AttentionSpec, heads: HeadPlan, edges: Sequence[int]
) -> tuple[tuple[Region, ...], ...]:
    """Each shard's halo as disjoint regions: of every row and KV head, from the earliest key that a call reads.

    Args:
        edges: shard p holds tokens [edges[p], edges[p + 1]).
    """
    needs = []
    for first, last in pairwise(edges):
        earliest: dict[tuple[int, int], int] = {}
        for read in shard_work(layout, spec, heads, first, last, False).reads:
            for row in range(read.row_start, read.row_stop):
                for head in range(read.head_start, read.head_stop):
                    earliest[row, head] = min(read.start, earliest.get((row, head), read.start))
        needs.append(tuple(_boxes(earliest, first)))
    return tuple(needs)


def _boxes(earliest: dict[tuple[int, int], int], stop: int) -> list[Region]:
    """{(row, KV head): first token} as boxes: adjacent heads with one start, then adjacent rows with the same boxes."""
    by_row: dict[int, list[tuple[int, int]]] = {}
    for (row, head), start in sorted(earliest.items()):
        by_row.setdefault(row, []).append((head, start))
    # Neighbours in a run keep the difference between their value and their place in the list.
    patterns: list[tuple[int, tuple[tuple[int, int, int], ...]]] = []
    for row, heads in by_row.items():
        runs = groupby(enumerate(heads), key=lambda item: (item[1][0] - item[0], item[1][1]))
        ranges = [([head for _, (head, _) in run], start) for (_, start), run in runs]
        patterns.append((row, tuple((run[0], run[-1] + 1, start) for run, start in ranges)))
    boxes: list[Region] = []
    for (_, pattern), same in groupby(enumerate(patterns), key=lambda item: (item[1][0] - item[0], item[1][1])):
        rows = [row for _, (row, _) in same]
        boxes.extend(Region(rows[0], rows[-1] + 1, head, head_stop, start, stop) for head, head_stop, start in pattern)
    return boxes


def halo_plan(layout: SequenceLayout, spec: AttentionSpec, heads: HeadPlan, edges: Sequence[int]) -> HaloPlan:
    """Who sends what to whom in one S² layer's forward pass; its backward sends as much the other way.

    Args:
        layout: of the global sequence.
        spec: kind s2.
        heads: this tensor-parallel rank's head blocks.
        edges: shard p holds tokens [edges[p], edges[p + 1]): context-parallel ranks' (`equal_edges`), or those of a
            streamed sequence's chunks (`stream.StreamPlan`).
    """
    key = ("halo plan", spec.group, heads.blocks, tuple(edges))
    return layout.remember(key, lambda: plan_halos(halo_needs(layout, spec, heads, edges), edges))


@cache
def halo_elements(arch: tuple[int, int, int], spec: AttentionSpec, sequence: int, tp: int, cp: int) -> int:
    """Elements of one sequence that a layer gets from other ranks, of the rank that gets most.

    K and V; and under full attention queries to attend, or outputs of those that moved.
    """
    heads, kv_heads, head_dim = arch
    if cp == 1:
        return 0
    if spec.kind == "full":
        moved = lent_tokens(spec, sequence, tp, cp) * heads // tp
        return (2 * (cp - 1) * -(-sequence // cp) * kv_heads // tp + moved) * head_dim
    tokens = GridPlan(tp, cp, 1, 1).shard_tokens(sequence)
    if cp > HALOS:
        # A shard never needs more than what lies between it and its first group's begin.
        return 2 * min(spec.group, sequence - tokens) * -(-kv_heads // tp) * head_dim
    layout, edges, local = SequenceLayout.dense(1, cp * tokens), equal_edges(cp, tokens), heads // tp
    most = 0
    for plan in {head_plan(rank * local, local, heads, kv_heads, spec.shifted_heads) for rank in range(tp)}:
        received = [0] * cp
        for message in halo_plan(layout, spec, plan, edges).messages:
            received[message.receiver] += message.vectors
        most = max(most, *received)
    return most * head_dim


def ring_bytes(batch: int, kv_heads: int, size: int, tokens: int, head_dim: int, element_size: int) -> int:
    """Bytes of K and V that each rank sends a layer in ring attention: its shard's size, once to pass on each shard."""
    return (size - 1) * 2 * tokens * batch * kv_heads * head_dim * element_size


@cache
def lent_tokens(spec: AttentionSpec, sequence: int, tp: int, cp: int) -> int:
    """Tokens of a sequence whose queries a layer moves, of the rank that lends or borrows most."""
    tokens = GridPlan(tp, cp, 1, 1).shard_tokens(sequence)
    return query_moves(SequenceLayout.dense(1, cp * tokens), spec, cp, tokens).most()


def least_saved(without: Sequence[str]) -> int | None:
    """`AttentionSpec.lend_from` under these words of train.without."""
    return None if "balanced_attention" in without else query_plan.LEND_FROM


def query_key_pairs(
    layout: SequenceLayout, spec: AttentionSpec, heads: HeadPlan, size: int, tokens: int
) -> tuple[int, ...]:
    """The work of each rank: (query head, query, key) triples that its attention computes, padding excluded."""
    group = spec.group if spec.kind == "s2" else None
    totals = [0] * size
    moves = query_moves(layout, spec, size, tokens).moves
    for block in blocks_of(spec, heads):
        count = block.q_stop - block.q_start
        for _, start, stop in layout.segments(group, block.shifted):
            for rank in range(start // tokens, (stop - 1) // tokens + 1):
                totals[rank] += count * _pairs(start, stop, rank * tokens, (rank + 1) * tokens)
            for move in moves:
                given = count * _pairs(start, stop, move.start, move.stop)
                totals[move.owner] -= given
                totals[move.worker] += given
    return tuple(totals)


def _pairs(start: int, stop: int, first: int, last: int) -> int:
    """(query, key) pairs of a segment [start, stop) of queries [first, last)."""
    low, high = max(start, first) - start, min(stop, last) - start
    # Query t of the segment sees t - start + 1 keys: a sum of consecutive integers.
    return (high * (high + 1) - low * (low + 1)) // 2 if low < high else 0
