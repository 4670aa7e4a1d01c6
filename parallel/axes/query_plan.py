"""Which queries of full attention a context-parallel rank has attended by another, by pure arithmetic; no torch.

Shards are contiguous, so under a causal mask the last rank of c has (2c - 1) / c times the mean work, and everybody
waits for it. Ranks above the mean therefore send queries to ranks below it, which hold all keys and values anyway once
these are gathered, and get the outputs back. What moves is the shortest stretch of a shard that has the surplus: of one
document the shard's end, whose queries see most keys. Of a shard of L tokens these are 0.27 L (the last of 2 ranks) to
0.5 L (of many), 15% of all tokens over many ranks; at 70B (64 query heads, 8 of keys) queries and outputs are 2.1 times
the bytes of the gather over 2 ranks and half of them over 8.

The alternative is a zig-zag of shards (rank r holds pieces r and 2c - 1 - r of 2c), as balanced rings have it. It moves
no queries, but evens out whole documents alone, not packed ones, and would have to hold for a whole step: S²'s halos
want contiguous shards, and labels, positions and chunks of a sequence follow them. To change between the two in each
layer would move the hidden states of nearly all tokens in place of some tokens' queries.

Every rank computes the same plan from the layout, so that sender and receiver agree without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EVEN = 1.02
"""Work of the busiest rank over the mean up to which nothing is moved."""
SLACK = 0.01
"""Of the mean: what a rank may get beyond it so that a remainder needs no message of its own."""

LEND_FROM = 4096
"""Keys at which a query's way to another rank and its output's way back, at 100 GB/s, take as long as its attention at
400 TFLOP/s: 4 bytes against 4 operations a key, of each element. Assumed, not measured."""


@dataclass(frozen=True)
class QueryMove:
    """Queries of tokens [start, stop), all rows and heads, that `worker` attends for `owner`, who holds them."""

    owner: int
    """Rank within the context-parallel group."""
    worker: int
    start: int
    """First token, counted over the whole sequence."""
    stop: int
    """Last token plus one."""

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class QueryPlan:
    """All moves of one layer's attention, by owner, then by token; the backward moves gradients along the same ways."""

    moves: tuple[QueryMove, ...] = ()

    def lent(self, rank: int) -> tuple[QueryMove, ...]:
        """What others attend for `rank`."""
        return tuple(move for move in self.moves if move.owner == rank)

    def borrowed(self, rank: int) -> tuple[QueryMove, ...]:
        """What `rank` attends for others."""
        return tuple(move for move in self.moves if move.worker == rank)

    def kept(self, rank: int, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """The stretches [start, stop) of a shard [first, last) that `rank` attends itself, in order."""
        stretches, at = [], first
        for move in self.lent(rank):
            if at < move.start:
                stretches.append((at, move.start))
            at = move.stop
        return (*stretches, (at, last)) if at < last else tuple(stretches)

    def most(self) -> int:
        """Tokens that the rank with most of them lends or borrows."""
        tokens: dict[int, int] = {}
        for move in self.moves:
            for rank in (move.owner, move.worker):
                tokens[rank] = tokens.get(rank, 0) + move.tokens
        return max(tokens.values(), default=0)


def plan_queries(work_T: np.ndarray, size: int, offset: int = 0) -> QueryPlan:
    """Moves after which no rank has more work than the mean, but for one token's or SLACK.

    Args:
        work_T: int64, work of each token's queries; shards of equal length, one after the other.
        size: ranks.
        offset: number of the first token.

    Returns:
        No moves where the busiest rank is within EVEN of the mean.
    """
    tokens = len(work_T) // size
    before = np.concatenate(([0], np.cumsum(work_T, dtype=np.int64)))
    totals = np.diff(before[::tokens])
    mean = -(-int(totals.sum()) // size)
    if totals.max() <= EVEN * mean:
        return QueryPlan()
    slack = int(SLACK * mean)
    # The most goes where there is most room: of one document rank r's to rank c - 1 - r, in one message.
    workers = [int(rank) for rank in np.argsort(totals, kind="stable") if totals[rank] < mean]
    owners = [int(rank) for rank in np.argsort(-totals, kind="stable") if totals[rank] > mean]
    pieces = [(owner, *_stretch(before, owner * tokens, tokens, int(totals[owner]) - mean)) for owner in owners]
    rooms = [mean - int(totals[worker]) for worker in workers]
    # Room that may be left over.
    spare = sum(rooms) - sum(int(before[stop] - before[start]) for _, start, stop in pieces)
    moves, place = [], 0
    for owner, at, stop in pieces:
        while at < stop:
            room, left = rooms[place], int(before[stop] - before[at])
            if room <= min(slack, spare):
                spare -= room
                place += 1
                continue
            end = stop if left <= room + slack else int(np.searchsorted(before, before[at] + room))
            given = int(before[end] - before[at])
            moves.append(QueryMove(owner, workers[place], offset + at, offset + end))
            rooms[place] = max(0, room - given)
            spare += max(0, given - room)
            at = end
    return QueryPlan(tuple(sorted(moves, key=lambda move: (move.owner, move.start))))


def _stretch(before: np.ndarray, first: int, tokens: int, surplus: int) -> tuple[int, int]:
    """The shortest stretch [start, stop) of a shard that has the surplus, the last of such; less its first token, so
    that it never has more."""
    shard = before[first : first + tokens + 1]
    stops = np.searchsorted(shard, shard + surplus)
    starts = np.flatnonzero(stops <= tokens)[::-1]
    start = int(starts[np.argmin(stops[starts] - starts)])
    # Tokens without work at the new begin need not travel.
    begin = int(np.searchsorted(shard, shard[start + 1], side="right")) - 1
    stop = int(stops[start])
    return first + min(begin, stop), first + stop
