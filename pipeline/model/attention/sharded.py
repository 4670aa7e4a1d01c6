"""S² and full attention over context-parallel shards (docs/ATTENTION.md).

Each rank holds contiguous tokens. Forward: the halo is posted, segments that begin in the shard are computed while it
flies, then those that straddle its start. Backward: the straddling ones first, their dK and dV are posted, the local
ones are computed while those fly, then what arrived is added. The order of the backward is autograd's own: of the ready
nodes it runs the one made last, and they are made in the order post, local, receive, straddling, place.

Full attention's work is evened out (`parallel.axes.query_plan`): queries leave beside K and V; what a rank borrows it
attends before its own straddling segments, so that outputs come home beside these. One ticket goes through all these
nodes in turn, so that every rank posts in one order, forward, backward and in a recomputation, whatever it moves.

Shape suffixes: L tokens of the shard, T of a move, B batch rows, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from parallel.axes.context import Exchange, Flight, GatherExchange, HaloExchange, QueryExchange
from parallel.axes.halo_plan import Region, equal_edges
from parallel.axes.query_plan import QueryMove
from parallel.errors import ConfigError
from parallel.world.context_shard import ContextShard
from pipeline.model.attention.backends import Backend, select_backend
from pipeline.model.attention.local import (
    PlaceWindows,
    TakeWindows,
    Window,
    attend_block,
    attend_straddling,
    gather_windows,
    placed_recipe,
)
from pipeline.model.layers.recipe import give_recipe
from pipeline.planning.attention_layout import AttentionSpec, HeadBlock, HeadPlan, SequenceLayout, Span, Straddle
from pipeline.planning.context_shards import ShardWork, attended, blocks_of, halo_plan, query_moves


class _Trip:
    """One exchange of one layer, shared by the two autograd nodes that post and receive it."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.there: Flight | None = None
        self.back: Flight | None = None


class _Moves:
    """The moved queries of one layer, shared by the four autograd nodes that post and receive them.

    Of the flights each is in the air from one node to the next: queries, outputs, and back again.
    """

    def __init__(self, exchange: QueryExchange) -> None:
        self.exchange = exchange
        self.flight: Flight | None = None

    def land(self) -> list[torch.Tensor]:
        """Wait for what is in the air."""
        assert self.flight is not None, "posted before"
        flight, self.flight = self.flight, None
        return flight.wait()


class _Post(torch.autograd.Function):
    """Posts K and V and returns the shard's own windows of them.

    Its backward is the last of the layer's attention: it writes the windows' gradients and adds what other ranks sent.
    The ticket [0, D] ties it to `_Receive`, so that every rank takes part, whatever it needs.
    """

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, trip: _Trip, windows: list[Window], disjoint: bool
    ) -> tuple[torch.Tensor, ...]:
        trip.there = trip.exchange.send(k, v)
        ctx.trip, ctx.windows, ctx.disjoint, ctx.shape = trip, windows, disjoint, k.shape
        return k.new_empty(0, k.shape[-1]), *(window.of(x) for x in (k, v) for window in windows)

    @staticmethod
    def backward(ctx: Any, ticket: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.windows)
        dk, dv = (
            gather_windows(ticket, ctx.shape, ctx.windows, part, ctx.disjoint)
            for part in (grads[:count], grads[count:])
        )
        flight, ctx.trip.back = ctx.trip.back, None
        ctx.trip.exchange.receive_back(flight, dk, dv)
        return dk, dv, None, None, None


class _Receive(torch.autograd.Function):
    """Awaits earlier ranks' K and V; its backward posts their gradients."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, trip: _Trip) -> tuple[torch.Tensor, ...]:
        assert trip.there is not None, "posted before"
        flight, trip.there = trip.there, None
        ctx.trip = trip
        return ticket.clone(), *trip.exchange.receive(flight)

    @staticmethod
    def backward(ctx: Any, ticket: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.trip.back = ctx.trip.exchange.send_back(grads, ticket)
        return ticket, None


class _SendQueries(torch.autograd.Function):
    """Posts the queries that others attend, and returns a ticket and windows of those that stay."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, moves: _Moves, windows: list[Window], covers: bool) -> tuple[Any, ...]:
        ctx.moves, ctx.windows, ctx.covers, ctx.shape = moves, windows, covers, q.shape
        moves.flight = moves.exchange.send([q[lent] for lent in moves.exchange.lent_slices()], q)
        return q.new_empty(0, q.shape[-1]), *(window.of(q) for window in windows)

    @staticmethod
    def backward(ctx: Any, ticket: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq = gather_windows(ticket, ctx.shape, ctx.windows, grads, True, ctx.covers)
        for lent, part in zip(ctx.moves.exchange.lent_slices(), ctx.moves.land(), strict=True):
            dq[lent].copy_(part)
        return dq, None, None, None


class _ReceiveQueries(torch.autograd.Function):
    """Awaits borrowed queries [T, B, H, D]; its backward posts their gradients."""

    @staticmethod
    def forward(ctx: Any, keys: torch.Tensor, queries: torch.Tensor, moves: _Moves) -> tuple[torch.Tensor, ...]:
        """Args: the tickets of K and V, and of the queries."""
        ctx.moves = moves
        return keys + queries, *moves.land()

    @staticmethod
    def backward(ctx: Any, ticket: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.needs_input_grad[1]:
            ctx.moves.flight = ctx.moves.exchange.send(grads, ticket, home=True, back=True)
        return ticket, ticket, None


class _SendOutputs(torch.autograd.Function):
    """Posts the outputs [T, B, H, D] of borrowed queries; its backward awaits their gradients."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, moves: _Moves, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.moves = moves
        moves.flight = moves.exchange.send(outputs, ticket, home=True)
        return ticket.clone()

    @staticmethod
    def backward(ctx: Any, ticket: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ticket, None, *ctx.moves.land()


class _ReceiveOutputs(torch.autograd.Function):
    """Awaits the outputs [T, B, H, D] of lent queries; its backward posts their gradients."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, moves: _Moves) -> tuple[torch.Tensor, ...]:
        ctx.moves = moves
        return ticket.clone(), *moves.land()

    @staticmethod
    def backward(ctx: Any, ticket: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.moves.flight = ctx.moves.exchange.send(grads, ticket, back=True)
        return ticket, None


class _Place(torch.autograd.Function):
    """Disjoint windows into one output, 0 elsewhere; `ticket` makes every rank run the backward of `_Receive`."""

    @staticmethod
    def forward(
        ctx: Any, like: torch.Tensor, ticket: torch.Tensor, windows: list[Window], covers: bool, *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.windows, ctx.empty = windows, like.shape
        # Saved so that a non-reentrant checkpoint recomputes the layer here, at the same point on every rank: its
        # exchange must not meet the backward's on one rank only.
        ctx.save_for_backward(ticket)
        return gather_windows(like, like.shape, windows, parts, True, covers)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ticket,) = ctx.saved_tensors
        # A rank of padding alone gives q a gradient of 0 here; elsewhere q's gradient comes through its windows.
        dq = None if ctx.windows else grad.new_zeros(ctx.empty)
        return dq, torch.zeros_like(ticket), None, None, *(window.of(grad) for window in ctx.windows)


def context_attend(
    q_LBHD: torch.Tensor,
    k_LBKD: torch.Tensor,
    v_LBKD: torch.Tensor,
    layout: SequenceLayout,
    spec: AttentionSpec,
    plan: HeadPlan,
    shard: ContextShard,
    softmax_scale: float | None = None,
    exchange: Callable[[Sequence[Region]], Exchange] | None = None,
    cut: bool = False,
) -> torch.Tensor:
    """This rank's tokens' part of `attend` over the whole sequence; every rank of `shard.group` must call it.

    Args:
        q_LBHD: queries of the shard's tokens, RoPE of their true positions applied, any strides, contiguous last axis.
        k_LBKD: keys of the shard's tokens, likewise; all ranks of the group hold the same KV heads.
        v_LBKD: values, likewise.
        layout: of the global sequence, right-padded to shard.size * L tokens; the same on every rank.
        spec: kind of attention; the same on every rank.
        plan: head blocks of this tensor-parallel rank.
        shard: this rank's tokens.
        softmax_scale: None: 1/sqrt(D).
        exchange: how what the calls read of other tokens is had; None: from the other ranks, which hold the rest of
            the sequence (otherwise they hold the rest of a chunk of it, see `model.streaming`).
        cut: segments that begin before the shard are passed over, and their queries get 0: nobody wants them.

    Returns:
        Contiguous [L, B, Hq, D] in q's dtype; 0 at padded positions.

    Raises:
        ConfigError: `legacy_wrap` is on, or the device lacks the backend.
        ValueError: shapes contradict the layout, the plan or the shard.
    """
    if spec.kind == "s2" and spec.dilation > 1:
        raise ConfigError("attention.dilation: is not computed over context shards; set parallel.cp to 1.")
    if spec.kind == "s2" and spec.legacy_wrap:
        raise ConfigError(
            "attention.legacy_wrap: the published roll wraps the whole sequence around and cannot be split over "
            f"context_parallel {shard.size}; switch legacy_wrap off or set context_parallel to 1."
        )
    blocks = blocks_of(spec, plan)
    if exchange is None and layout.sequence != shard.size * shard.tokens:
        raise ValueError(f"the layout has {layout.sequence} tokens, not {shard.size} shards of {shard.tokens}")
    sizes = (shard.tokens, layout.batch)
    if q_LBHD.shape[:3] != (*sizes, blocks[-1].q_stop) or k_LBKD.shape[:3] != (*sizes, blocks[-1].kv_stop):
        raise ValueError(
            f"q {tuple(q_LBHD.shape)} and k {tuple(k_LBKD.shape)} do not fit a shard [L, B] = {sizes} with "
            f"{blocks[-1].q_stop} query and {blocks[-1].kv_stop} KV heads."
        )
    head_dim = q_LBHD.shape[-1]
    backend = select_backend(spec.backend, q_LBHD.device, q_LBHD.dtype, head_dim)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    moved = query_moves(layout, spec, shard.size, shard.tokens, shard.offset)
    edges = shard.start, shard.stop
    work, borrowed = attended(layout, spec, plan, moved, shard.rank, *edges, backend.varlen is not None)
    if cut and work.straddling:
        work = replace(work, straddling=(), reads=(), fills=False)
    reads = _all_reads(work, borrowed, moved.borrowed(shard.rank), layout.batch, blocks[-1].kv_stop)
    trip = _Trip(_exchange(layout, spec, plan, shard, reads) if exchange is None else exchange(reads))

    calls, q_windows, kv_windows = _calls(work)
    lent = [
        Window(Span(0, layout.batch, move.start - shard.start, move.tokens), 0, blocks[-1].q_stop)
        for move in moved.lent(shard.rank)
    ]
    shared = HeadPlan.reuses_kv(blocks)
    disjoint = work.fills and not lent and not shared
    posted: tuple[torch.Tensor, ...] = _Post.apply(k_LBKD, v_LBKD, trip, kv_windows, disjoint)
    ticket, keys, values = posted[0], posted[1 : 1 + len(calls)], posted[1 + len(calls) :]
    moves = None
    if moved.moves:
        moves = _Moves(QueryExchange(shard, moved, q_LBHD.shape[1:]))
        queries_ticket, *queries = _SendQueries.apply(q_LBHD, moves, q_windows, work.fills)
    else:
        queries = TakeWindows.apply(q_LBHD, q_windows, work.fills) if calls else ()

    inputs = list(zip(queries, keys, values, strict=True))
    count = len(work.local)
    parts = [
        attend_block(q, k, v, span, span, backend, scale)
        for (q, k, v), (_, span) in zip(inputs[:count], work.local, strict=True)
    ]
    received: tuple[torch.Tensor, ...] = _Receive.apply(ticket, trip)
    ticket, early, others = received[0], received[1 : 1 + 2 * len(work.reads)], received[1 + 2 * len(work.reads) :]
    if moves is not None:
        ticket, *arrived = _ReceiveQueries.apply(ticket, queries_ticket, moves)
        outputs = []
        for q_TBHD, one in zip(arrived, borrowed, strict=True):
            read = 2 + 2 * len(one.reads)
            outputs.append(_attend_borrowed(q_TBHD, others[:read], one, shared, backend, scale, spec.kernels))
            others = others[read:]
        ticket = _SendOutputs.apply(ticket, moves, *outputs)
    parts.extend(_attend_early(inputs[count:], early, backend, scale, spec.kernels))
    if moves is not None:
        ticket, *returned = _ReceiveOutputs.apply(ticket, moves)
        parts.extend(part.transpose(0, 1) for part in returned)
        q_windows = [*q_windows, *lent]
    out: torch.Tensor = _Place.apply(q_LBHD, ticket, q_windows, work.fills, *parts)
    give_recipe(out, placed_recipe(parts, q_LBHD.shape, q_windows, work.fills))
    return out


def _calls(work: ShardWork) -> tuple[list[tuple[HeadBlock, Span]], list[Window], list[Window]]:
    """All calls, local ones first, and what each reads of the shard's own queries, and of its keys and values."""
    calls = [*work.local, *((block, _own(straddle)) for block, straddle in work.straddling)]
    q_windows = [Window(span, block.q_start, block.q_stop) for block, span in calls]
    return calls, q_windows, [Window(span, block.kv_start, block.kv_stop) for block, span in calls]


def _all_reads(
    work: ShardWork, borrowed: Sequence[ShardWork], moves: Sequence[QueryMove], rows: int, kv_heads: int
) -> tuple[Region, ...]:
    """What is read of gathered K and V: by the own calls, and for each move its own tokens, then what came before."""
    reads = list(work.reads)
    for one, move in zip(borrowed, moves, strict=True):
        reads += Region(0, rows, 0, kv_heads, move.start, move.stop), *one.reads
    return tuple(reads)


def _attend_early(
    inputs: Sequence[tuple[torch.Tensor, ...]],
    early: Sequence[torch.Tensor],
    backend: Backend,
    scale: float,
    fused: bool,
) -> list[torch.Tensor]:
    """Straddling segments: (q, k, v) [B, S, H, D] of each, and K and V [T, B, K, D] of before, alternating."""
    pairs = zip(early[0::2], early[1::2], strict=True)
    return [
        attend_straddling(q, early_k.transpose(0, 1), early_v.transpose(0, 1), k, v, backend, scale, fused)
        for (q, k, v), (early_k, early_v) in zip(inputs, pairs, strict=True)
    ]


def _attend_borrowed(
    q_TBHD: torch.Tensor,
    read: Sequence[torch.Tensor],
    work: ShardWork,
    shared: bool,
    backend: Backend,
    scale: float,
    fused: bool,
) -> torch.Tensor:
    """Output [T, B, H, D] of queries that another rank holds.

    Args:
        q_TBHD: of a move.
        read: K and V [T, B, K, D] of the move's own tokens, then those that its straddling calls read of earlier ones.
        work: calls of a shard of these tokens alone.
        shared: some KV head is read by two blocks of heads.
    """
    k_TBKD, v_TBKD, *early = read
    calls, q_windows, kv_windows = _calls(work)
    disjoint = work.fills and not shared
    queries = TakeWindows.apply(q_TBHD, q_windows, work.fills)
    keys, values = (TakeWindows.apply(x, kv_windows, disjoint) for x in (k_TBKD, v_TBKD))
    inputs, count = list(zip(queries, keys, values, strict=True)), len(work.local)
    parts = [
        attend_block(q, k, v, span, span, backend, scale)
        for (q, k, v), (_, span) in zip(inputs[:count], work.local, strict=True)
    ]
    parts += _attend_early(inputs[count:], early, backend, scale, fused)
    placed: torch.Tensor = PlaceWindows.apply(q_TBHD.shape, q_windows, work.fills, *parts)
    return placed


def _own(straddle: Straddle) -> Span:
    """The shard's part of a straddling segment."""
    return Span(straddle.row_start, straddle.row_stop, straddle.at, straddle.length)


def _exchange(
    layout: SequenceLayout, spec: AttentionSpec, plan: HeadPlan, shard: ContextShard, reads: Sequence[Region]
) -> Exchange:
    if spec.kind == "full":
        return GatherExchange(shard, reads)
    return HaloExchange(shard, halo_plan(layout, spec, plan, equal_edges(shard.size, shard.tokens)), reads)
