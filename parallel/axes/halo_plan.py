"""Which boxes of K and V each context-parallel rank sends to which other, by pure arithmetic; no torch.

A rank says what it needs as `Region`s of the whole sequence; every rank computes every rank's plan, identically, so
sender and receiver agree without a word and the bytes are known before they are sent.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 64
"""Bytes at a multiple of which every parked message begins in host memory: right for any dtype."""


@dataclass(frozen=True, order=True)
class Region:
    """A box of a [tokens, rows, KV heads, D] tensor of the whole sequence; all bounds are half-open."""

    row_start: int
    row_stop: int
    head_start: int
    head_stop: int
    start: int
    """First token, counted over the whole sequence."""
    stop: int
    """Last token plus one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens, rows, heads)."""
        return self.stop - self.start, self.row_stop - self.row_start, self.head_stop - self.head_start

    @property
    def vectors(self) -> int:
        """How many vectors of D elements it holds."""
        tokens, rows, heads = self.shape
        return tokens * rows * heads

    def meet(self, other: Region) -> Region | None:
        """The box common to both, or None."""
        common = Region(
            max(self.row_start, other.row_start),
            min(self.row_stop, other.row_stop),
            max(self.head_start, other.head_start),
            min(self.head_stop, other.head_stop),
            max(self.start, other.start),
            min(self.stop, other.stop),
        )
        return common if min(common.shape) > 0 else None

    def slices(self, origin: Region) -> tuple[slice, slice, slice]:
        """Where it lies (tokens, rows, heads) in a tensor that holds `origin`."""
        return (
            slice(self.start - origin.start, self.stop - origin.start),
            slice(self.row_start - origin.row_start, self.row_stop - origin.row_start),
            slice(self.head_start - origin.head_start, self.head_stop - origin.head_start),
        )


@dataclass(frozen=True)
class Message:
    """Everything one rank sends another: one packed buffer, for each piece its K and then its V."""

    sender: int
    receiver: int
    pieces: tuple[Region, ...]

    @property
    def vectors(self) -> int:
        """Vectors of D elements in the buffer, K and V counted."""
        return 2 * sum(piece.vectors for piece in self.pieces)


@dataclass(frozen=True)
class HaloPlan:
    """All messages of one exchange, by sender and receiver (ranks within the context-parallel group)."""

    messages: tuple[Message, ...]

    def outgoing(self, rank: int) -> tuple[Message, ...]:
        """What `rank` sends in the forward pass (and gets gradients for in the backward)."""
        return tuple(message for message in self.messages if message.sender == rank)

    def incoming(self, rank: int) -> tuple[Message, ...]:
        """What `rank` receives in the forward pass."""
        return tuple(message for message in self.messages if message.receiver == rank)


def equal_edges(size: int, tokens: int) -> tuple[int, ...]:
    """Edges of `size` shards of `tokens`: rank p holds [p L, (p + 1) L)."""
    return tuple(range(0, (size + 1) * tokens, tokens))


def plan_halos(needs: Sequence[Sequence[Region]], edges: Sequence[int]) -> HaloPlan:
    """Cut every rank's needs by who holds the tokens: rank p holds [edges[p], edges[p + 1]).

    Args:
        needs: disjoint regions of each rank, of tokens before its own shard.
        edges: rising; one more than ranks.

    Raises:
        ValueError: a rank needs tokens that are not before its shard, or one vector twice.
    """
    messages = []
    for receiver, regions in enumerate(needs):
        for index, region in enumerate(regions):
            if region.start < 0 or region.stop > edges[receiver] or min(region.shape) < 1:
                raise ValueError(f"rank {receiver} cannot need {region}: its shard starts at {edges[receiver]}")
            if any(region.meet(other) for other in regions[:index]):
                raise ValueError(f"rank {receiver} needs part of {region} twice")
        first = min((bisect_right(edges, region.start) - 1 for region in regions), default=receiver)
        beyond = bisect_left(edges, max((region.stop for region in regions), default=0))
        for sender in range(first, min(receiver, beyond)):
            pieces = []
            for region in regions:
                start, stop = max(region.start, edges[sender]), min(region.stop, edges[sender + 1])
                if start < stop:
                    rows, heads = (region.row_start, region.row_stop), (region.head_start, region.head_stop)
                    pieces.append(Region(*rows, *heads, start, stop))
            if pieces:
                messages.append(Message(sender, receiver, tuple(pieces)))
    return HaloPlan(tuple(sorted(messages, key=lambda message: (message.sender, message.receiver))))
