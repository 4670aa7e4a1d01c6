"""How the windows of an evaluation are spread over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shards:
    """How windows are spread over data-parallel ranks; the default is one process.

    Ranks may get different numbers of windows, so `nll` must not talk across this group.
    """

    rank: int = 0
    world: int = 1
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    """Sums an fp64 tensor over the ranks and returns it."""
    lockstep: bool = False
    """Every rank runs the model equally often, the last rounds for nothing: weights are gathered together."""
    before_round: Callable[[], None] = lambda: None
    """Called by every rank before each of its windows, equally often on all; what it raises ends the evaluation."""


def shard(windows: int, rank: int, world: int) -> range:
    """Indices of the windows rank `rank` of `world` evaluates: every world-th."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside a world of {world}")
    return range(rank, windows, world)


def turns(windows: int, shards: Shards) -> Iterator[tuple[int, bool]]:
    """(window, whether it is this rank's) of each of a rank's forwards; in lockstep the last may be for nothing."""
    own = shard(windows, shards.rank, shards.world)
    for turn in range(-(-windows // shards.world)):
        shards.before_round()
        if turn < len(own):
            yield own[turn], True
        elif shards.lockstep:
            yield windows - 1, False


def rounds[Window](windows: Sequence[Window], world: int, most: int) -> Iterator[list[Sequence[Window]]]:
    """Windows in batches of `most` (one at least), a batch a rank; smaller ones where else a rank would get none."""
    size = max(1, min(most, -(-len(windows) // world)))
    batches = [windows[at : at + size] for at in range(0, len(windows), size)]
    for at in range(0, len(batches), world):
        yield batches[at : at + world]
