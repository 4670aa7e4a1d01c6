"""The order of training: every epoch a permutation, the same for any rank split, and a function of the step alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError
from pipeline.data.sampler import epoch_permutation, rank_indices, step_indices

seeds = st.integers(min_value=-(2**70), max_value=2**70)
sizes = st.integers(min_value=1, max_value=60)
GOLDEN = [2, 0, 1, 4, 5, 6, 7, 3]
"""Seed 1, epoch 0, 8 windows."""


def ordered(seed: int, steps: int, batch: int, windows: int) -> list[int]:
    return [index for step in range(steps) for index in step_indices(seed, step, batch, windows).tolist()]


@given(seed=seeds, epoch=st.integers(0, 1 << 40), windows=st.integers(1, 200))
def test_every_epoch_is_a_permutation(seed: int, epoch: int, windows: int) -> None:
    order = epoch_permutation(seed, epoch, windows)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(windows))
    assert not order.flags.writeable


def test_order_is_the_documented_one_on_every_machine() -> None:
    # Recorded: a resumed run must see this order with any later NumPy.
    assert epoch_permutation(1, 0, 8).tolist() == GOLDEN
    words = np.random.Philox(np.random.SeedSequence([1, 0])).random_raw(8).tolist()
    assert sorted(range(8), key=words.__getitem__) == GOLDEN


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(epoch_permutation(seed, epoch, 50).tolist()) for seed in (-1, 0, 1, 2) for epoch in range(5)}
    assert len(orders) == 20


@given(seed=seeds, batch=sizes, windows=sizes)
def test_the_stream_of_batches_is_epoch_after_epoch(seed: int, batch: int, windows: int) -> None:
    steps = 2 * windows // batch + 2
    stream = ordered(seed, steps, batch, windows)
    epochs = range(-(-len(stream) // windows))
    plain = [index for epoch in epochs for index in epoch_permutation(seed, epoch, windows).tolist()]
    assert stream == plain[: len(stream)]


@given(seed=seeds, batch=sizes, windows=sizes, data=st.data())
def test_random_access_equals_sequential(seed: int, batch: int, windows: int, data: st.DataObject) -> None:
    sequential = ordered(seed, 12, batch, windows)
    for step in data.draw(st.permutations(range(12))):
        assert step_indices(seed, step, batch, windows).tolist() == sequential[step * batch : (step + 1) * batch]


@given(
    world=st.integers(1, 6), micro=st.integers(1, 4), accumulate=st.integers(1, 4), step=st.integers(0, 9), seed=seeds
)
def test_any_rank_split_gives_the_same_global_order(
    world: int, micro: int, accumulate: int, step: int, seed: int
) -> None:
    batch = step_indices(seed, step, world * micro * accumulate, 37)
    parts = [rank_indices(batch, rank, world, micro) for rank in range(world)]
    assert all(len(mine) == accumulate and all(part.shape == (micro,) for part in mine) for mine in parts)
    assert np.concatenate([part for mine in parts for part in mine]).tolist() == batch.tolist()


@pytest.mark.parametrize(("batch", "world", "micro"), [(6, 4, 1), (6, 2, 2), (1, 2, 1), (3, 1, 2)])
def test_uneven_split_is_refused(batch: int, world: int, micro: int) -> None:
    with pytest.raises(ConfigError, match=rf"train.global_batch: {batch} is not a multiple of {world} .* {micro};"):
        rank_indices(np.arange(batch), 0, world, micro)
