"""Which windows an optimizer step trains on: a pure function of seed and step, equal on every machine and world size.

Nothing is stored and nothing advances, so resuming at step n needs only n.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError

Permutation = Callable[[int, int, int], NDArray[np.int64]]
"""Of seed, epoch and windows."""


def permutation_of(stream: int) -> Permutation:
    """The order of epochs, one of many that do not resemble each other; see `epoch_permutation`, which is stream 0."""

    # Two epochs are kept, as a batch may straddle them.
    @lru_cache(maxsize=2)
    def permutation(seed: int, epoch: int, windows: int) -> NDArray[np.int64]:
        # SeedSequence takes no negative words.
        seeds = [seed % (1 << 64), epoch] + [stream] * (stream > 0)
        words = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(windows)
        order = np.argsort(words, kind="stable").astype(np.int64)
        order.flags.writeable = False
        return order

    return permutation


_first_stream = permutation_of(0)


def epoch_permutation(seed: int, epoch: int, windows: int) -> NDArray[np.int64]:
    """The order of one epoch, a permutation of range(windows), int64 [windows]; read-only.

    Built from raw Philox words, whose stream NumPy guarantees across versions, unlike that of Generator.permutation.
    """
    return _first_stream(seed, epoch, windows)


def step_indices(seed: int, step: int, global_batch: int, windows: int, first: int | None = None) -> NDArray[np.int64]:
    """Windows of optimizer step `step`, int64 [global_batch].

    Epochs follow each other without a gap: a batch that outlasts one continues in the next, several times if the data
    are smaller than a batch.

    Args:
        seed: any integer.
        step: 0-based.
        global_batch: sequences an optimizer step.
        windows: length of the data set, at least 1.
        first: sequences read before this step; None: step * global_batch, as in a run whose batch never changed.
    """
    first = step * global_batch if first is None else first
    return windows_at(seed, first + np.arange(global_batch, dtype=np.int64), windows)


def windows_at(
    seed: int, positions: NDArray[np.int64], windows: int, permutation: Permutation = epoch_permutation
) -> NDArray[np.int64]:
    """Windows at these places of the endless order of epochs, int64 [positions].

    Args:
        positions: increasing, at least one.
        windows: of an epoch.
        permutation: the order of an epoch, as `epoch_permutation`.
    """
    epochs, offsets = np.divmod(positions, windows)
    out = np.empty(positions.size, np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        out[here] = permutation(seed, epoch, windows)[offsets[here]]
    return out


def rank_indices(indices: NDArray[np.int64], rank: int, world: int, micro_batch: int) -> list[NDArray[np.int64]]:
    """The micro-batches of one data-parallel rank: consecutive slices of its consecutive part of the global batch.

    Args:
        indices: the global batch, [B].
        rank: in [0, world).
        world: data-parallel ranks.
        micro_batch: sequences a forward pass.

    Returns:
        B / (world * micro_batch) arrays, each int64 [micro_batch].

    Raises:
        ConfigError: B is not a multiple of world * micro_batch.
    """
    if len(indices) % (world * micro_batch):
        raise ConfigError(
            f"train.global_batch: {len(indices)} is not a multiple of {world} data-parallel ranks times "
            f"train.micro_batch {micro_batch}; change one of them."
        )
    share = len(indices) // world
    mine = indices[rank * share : (rank + 1) * share]
    return [mine[start : start + micro_batch] for start in range(0, share, micro_batch)]
