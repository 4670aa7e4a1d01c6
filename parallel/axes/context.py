"""Moves K and V between context-parallel ranks, and their gradients back; knows ranks, rows, heads and tokens only.

Two exchanges with one interface: `HaloExchange` sends each rank just the boxes of earlier K and V that it needs,
straight from each owner; `GatherExchange` gives every rank everything (full attention). Beside the latter,
`QueryExchange` moves queries to ranks with less work, and outputs back. Each direction is posted by one call and
awaited by another, so that work can be done in between. Every rank of the group must make the same calls in the same
order, also when it has nothing to send.

Shape suffixes: L tokens of a shard, T tokens of a region, B rows, K KV heads, D head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from parallel.axes.halo_plan import HaloPlan, Message, Region
from parallel.axes.query_plan import QueryPlan
from parallel.world.context_shard import ContextShard
from parallel.world.lone_rank import to_receive


@dataclass
class Flight:
    """Transfers on their way. Holds every buffer until `wait`: NCCL reads and writes them on a stream of its own."""

    works: list[Any]
    arriving: list[torch.Tensor]
    leaving: list[torch.Tensor]

    def wait(self) -> list[torch.Tensor]:
        """The arrived buffers, safe to use on the current stream."""
        for work in self.works:
            work.wait()
        # The current stream now waits for the transfers, so memory freed to it is reused only after them.
        self.leaving = []
        return self.arriving


class Exchange(Protocol):
    """One layer's movement of K and V, and of their gradients."""

    def send(self, k_LBKD: torch.Tensor, v_LBKD: torch.Tensor) -> Flight:
        """Post what others need and what this rank needs; k and v may have any strides."""

    def receive(self, flight: Flight) -> list[torch.Tensor]:
        """Wait; K and then V [T, rows, heads, D] of every region this rank reads, in order."""

    def send_back(self, grads: Sequence[torch.Tensor], like: torch.Tensor) -> Flight:
        """Post the gradients of what `receive` returned, and the arrival of those for what `send` sent.

        `like` is any tensor [..., D] of their dtype and device, for a rank that has none.
        """

    def receive_back(self, flight: Flight, dk_LBKD: torch.Tensor, dv_LBKD: torch.Tensor) -> None:
        """Wait, and add what arrived to dk and dv."""


_acquainted: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def acquaint(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make NCCL connect all ranks of the group, once: a first point-to-point call by only some of them would hang."""
    if device.type == "cuda" and group not in _acquainted:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _acquainted.add(group)


def _bytes(buffers: Sequence[torch.Tensor]) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


Box = tuple[Region, tuple[torch.Tensor, torch.Tensor]]
"""A piece and its K and V [T, rows, heads, D]."""


class HaloExchange:
    """Point to point between the owners and the readers of a halo, one packed buffer a pair, one batch a direction.

    Args:
        shard: this rank's place.
        plan: everybody's messages.
        reads: what this rank's calls read, each within what `plan` delivers to it; they may overlap.
    """

    def __init__(self, shard: ContextShard, plan: HaloPlan, reads: Sequence[Region]) -> None:
        self.shard, self.reads = shard, tuple(reads)
        self.outgoing, self.incoming = plan.outgoing(shard.rank), plan.incoming(shard.rank)

    def send(self, k_LBKD: torch.Tensor, v_LBKD: torch.Tensor) -> Flight:
        """As `Exchange.send`."""
        acquaint(self.shard.group, k_LBKD.device)
        dim = k_LBKD.shape[-1]
        leaving = [self.pack(message, k_LBKD, v_LBKD) for message in self.outgoing]
        arriving = [to_receive(k_LBKD, (message.vectors * dim,), self.shard.group) for message in self.incoming]
        self.shard.meter.sent += _bytes(leaving)
        self.shard.meter.received += _bytes(arriving)
        return post(
            self.shard.group,
            [message.receiver for message in self.outgoing],
            leaving,
            [m.sender for m in self.incoming],
            arriving,
        )

    def receive(self, flight: Flight) -> list[torch.Tensor]:
        """As `Exchange.receive`; a region that arrived as one piece is a view of the buffer."""
        boxes = self._boxes(flight.wait())
        found: list[torch.Tensor] = []
        for read in self.reads:
            parts = [(piece, common, pair) for piece, pair in boxes if (common := piece.meet(read)) is not None]
            if sum(common.vectors for _, common, _ in parts) != read.vectors:
                raise RuntimeError(f"rank {self.shard.rank}: the halo plan does not deliver {read}")
            if len(parts) == 1:
                piece, common, pair = parts[0]
                found.extend(x[common.slices(piece)] for x in pair)
                continue
            whole = [parts[0][2][0].new_empty((*read.shape, parts[0][2][0].shape[-1])) for _ in range(2)]
            for piece, common, pair in parts:
                for target, source in zip(whole, pair, strict=True):
                    target[common.slices(read)].copy_(source[common.slices(piece)])
            found.extend(whole)
        return found

    def send_back(self, grads: Sequence[torch.Tensor], like: torch.Tensor) -> Flight:
        """As `Exchange.send_back`."""
        leaving = self.gradients(grads, like)
        arriving = [
            to_receive(like, (message.vectors * like.shape[-1],), self.shard.group) for message in self.outgoing
        ]
        self.shard.meter.sent_back += _bytes(leaving)
        self.shard.meter.received_back += _bytes(arriving)
        return post(
            self.shard.group, [m.sender for m in self.incoming], leaving, [m.receiver for m in self.outgoing], arriving
        )

    def receive_back(self, flight: Flight, dk_LBKD: torch.Tensor, dv_LBKD: torch.Tensor) -> None:
        """As `Exchange.receive_back`."""
        for message, buffer in zip(self.outgoing, flight.wait(), strict=True):
            self.add(message, buffer, dk_LBKD, dv_LBKD)

    def pack(self, message: Message, k_LBKD: torch.Tensor, v_LBKD: torch.Tensor) -> torch.Tensor:
        """What the message takes of this rank's K and V, 1-D."""
        return torch.cat(
            [x[self.local_slices(piece)].reshape(-1) for piece in message.pieces for x in (k_LBKD, v_LBKD)]
        )

    def gradients(self, grads: Sequence[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
        """For each incoming message the gradient of its buffer, summed over the calls that read it."""
        buffers = [like.new_zeros(message.vectors * like.shape[-1]) for message in self.incoming]
        for piece, pair in self._boxes(buffers):
            for read, *read_grads in zip(self.reads, grads[0::2], grads[1::2], strict=True):
                common = piece.meet(read)
                if common is not None:
                    for target, source in zip(pair, read_grads, strict=True):
                        target[common.slices(piece)].add_(source[common.slices(read)])
        return buffers

    def add(self, message: Message, buffer: torch.Tensor, dk_LBKD: torch.Tensor, dv_LBKD: torch.Tensor) -> None:
        """Add the gradient of an outgoing message's buffer where its vectors lie."""
        for piece, pair in _unpack(message, buffer):
            for target, source in zip((dk_LBKD, dv_LBKD), pair, strict=True):
                target[self.local_slices(piece)].add_(source)

    def local_slices(self, piece: Region) -> tuple[slice, slice, slice]:
        """Where a piece that this rank owns lies in its K and V [L, B, K, D]."""
        start = self.shard.start
        return (
            slice(piece.start - start, piece.stop - start),
            slice(piece.row_start, piece.row_stop),
            slice(piece.head_start, piece.head_stop),
        )

    def _boxes(self, buffers: Sequence[torch.Tensor]) -> list[Box]:
        """All incoming pieces, as views of the messages' buffers."""
        return [box for message, buffer in zip(self.incoming, buffers, strict=True) for box in _unpack(message, buffer)]


def post(
    group: dist.ProcessGroup,
    targets: Sequence[int],
    leaving: list[torch.Tensor],
    sources: Sequence[int],
    arriving: list[torch.Tensor],
) -> Flight:
    """One batch of point-to-point transfers; peers are ranks within the group."""
    operations = [
        dist.P2POp(call, buffer, dist.get_global_rank(group, peer), group)
        for call, peers, buffers in ((dist.isend, targets, leaving), (dist.irecv, sources, arriving))
        for peer, buffer in zip(peers, buffers, strict=True)
    ]
    return Flight(dist.batch_isend_irecv(operations) if operations else [], arriving, leaving)


def _unpack(message: Message, buffer: torch.Tensor) -> Iterator[Box]:
    """The pieces of one message, as views of its buffer."""
    dim, offset = buffer.numel() // message.vectors, 0
    for piece in message.pieces:
        count = piece.vectors * dim
        k, v = (buffer[at : at + count].view(*piece.shape, dim) for at in (offset, offset + count))
        yield piece, (k, v)
        offset += 2 * count


class GatherExchange:
    """Everybody's K and V to everybody; backward, each rank's gradients of all are summed where they belong.

    Args:
        shard: this rank's place.
        reads: what this rank's calls read, any tokens; they may overlap.
    """

    def __init__(self, shard: ContextShard, reads: Sequence[Region]) -> None:
        self.shard, self.reads = shard, tuple(reads)
        self._shape: torch.Size | None = None

    def send(self, k_LBKD: torch.Tensor, v_LBKD: torch.Tensor) -> Flight:
        """As `Exchange.send`."""
        size = self.shard.size
        self._shape = k_LBKD.shape
        leaving = [k_LBKD.contiguous(), v_LBKD.contiguous()]
        arriving = [to_receive(x, (size * x.shape[0], *x.shape[1:]), self.shard.group) for x in leaving]
        works = [
            dist.all_gather_into_tensor(whole, own, group=self.shard.group, async_op=True)
            for whole, own in zip(arriving, leaving, strict=True)
        ]
        self.shard.meter.sent += (size - 1) * _bytes(leaving)
        self.shard.meter.received += (size - 1) * _bytes(leaving)
        return Flight(works, arriving, leaving)

    def receive(self, flight: Flight) -> list[torch.Tensor]:
        """As `Exchange.receive`; views of the gathered K and V."""
        gathered = flight.wait()
        return [x[self._slices(read)] for read in self.reads for x in gathered]

    def send_back(self, grads: Sequence[torch.Tensor], like: torch.Tensor) -> Flight:
        """As `Exchange.send_back`."""
        assert self._shape is not None, "send_back follows send"
        size, (tokens, *rest) = self.shard.size, self._shape
        leaving = [like.new_zeros((size * tokens, *rest)) for _ in range(2)]
        for read, *read_grads in zip(self.reads, grads[0::2], grads[1::2], strict=True):
            for target, source in zip(leaving, read_grads, strict=True):
                target[self._slices(read)].add_(source)
        arriving = [to_receive(x, self._shape, self.shard.group) for x in leaving]
        works = [
            dist.reduce_scatter_tensor(own, whole, group=self.shard.group, async_op=True)
            for own, whole in zip(arriving, leaving, strict=True)
        ]
        self.shard.meter.sent_back += (size - 1) * _bytes(arriving)
        self.shard.meter.received_back += (size - 1) * _bytes(arriving)
        return Flight(works, arriving, leaving)

    def receive_back(self, flight: Flight, dk_LBKD: torch.Tensor, dv_LBKD: torch.Tensor) -> None:
        """As `Exchange.receive_back`."""
        for target, source in zip((dk_LBKD, dv_LBKD), flight.wait(), strict=True):
            target.add_(source)

    @staticmethod
    def _slices(read: Region) -> tuple[slice, slice, slice]:
        return (
            slice(read.start, read.stop),
            slice(read.row_start, read.row_stop),
            slice(read.head_start, read.head_stop),
        )


class QueryExchange:
    """Queries to whom attends them and outputs home; backward, the outputs' gradients there and the queries' home.

    Point to point, one message a move and one batch a direction.

    Args:
        shard: this rank's place.
        plan: everybody's moves.
        shape: (B, H, D) of the queries.
    """

    def __init__(self, shard: ContextShard, plan: QueryPlan, shape: Sequence[int]) -> None:
        self.shard, self.shape = shard, tuple(shape)
        self.lent, self.borrowed = plan.lent(shard.rank), plan.borrowed(shard.rank)

    def lent_slices(self) -> list[slice]:
        """Where the queries of each move that leaves lie among the shard's tokens."""
        start = self.shard.start
        return [slice(move.start - start, move.stop - start) for move in self.lent]

    def send(
        self, parts: Sequence[torch.Tensor], like: torch.Tensor, *, home: bool = False, back: bool = False
    ) -> Flight:
        """Post what leaves and what comes, [tokens, B, H, D] a move.

        Args:
            parts: of the queries that this rank lends, in order; with `home` of those that it borrows.
            like: any tensor of their dtype and device.
            home: from workers to owners; else from owners to workers.
            back: the backward's: counted with gradients.
        """
        group, meter = self.shard.group, self.shard.meter
        acquaint(group, like.device)
        leaving = [part.contiguous() for part in parts]
        come = self.lent if home else self.borrowed
        arriving = [to_receive(like, (move.tokens, *self.shape), group) for move in come]
        owners, workers = [move.owner for move in self.borrowed], [move.worker for move in self.lent]
        if back:
            meter.sent_back += _bytes(leaving)
            meter.received_back += _bytes(arriving)
        else:
            meter.sent += _bytes(leaving)
            meter.received += _bytes(arriving)
        return post(group, owners if home else workers, leaving, workers if home else owners, arriving)
