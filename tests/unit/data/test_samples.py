"""Best fit against its definition, item by item."""

from __future__ import annotations

import numpy as np

from pipeline.data.samples import best_fit


def _best_fit_by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        rooms = [capacity - sum(lengths[other] for other in items) for items in bins]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            bins[min(fitting)[1]].append(item)
        else:
            bins.append([item])
    return [sorted(items) for items in bins]


def test_best_fit_packs_whole_samples() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    bins = best_fit(lengths, 128)
    assert sorted(item for items in bins for item in items) == list(range(300))
    sums = [int(lengths[items].sum()) for items in bins]
    assert max(sums) <= 128 and int(lengths.sum()) / (len(bins) * 128) > 0.97
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]
    for capacity in (100, 128, 500):
        assert best_fit(lengths, capacity) == _best_fit_by_definition(lengths.tolist(), capacity)
