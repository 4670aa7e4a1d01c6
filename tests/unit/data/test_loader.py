"""Batches prepared one step ahead are those made on the spot, errors in the background included."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.errors import ConfigError, DataError
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.packing import PackedDataset, Window
from pipeline.data.sampler import step_indices
from tests.support.data_helpers import make_shards

SEQUENCE = 4


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    # 79 tokens, 19 windows of 4; every window starts with another token, so a window is known by its first.
    documents = [list(range(start, start + size)) for start, size in ((10, 21), (50, 3), (60, 40), (110, 11))]
    return PackedDataset(make_shards(tmp_path / "shards", documents), SEQUENCE)


def loader(
    dataset: PackedDataset, rank: int = 0, world: int = 1, batch: int = 8, micro: int = 2, mask: bool = True
) -> TrainLoader:
    return TrainLoader(dataset, 3, batch, micro, rank, world, mask)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.labels, b.labels)
        and (a.document_ids is b.document_ids is None or torch.equal(a.document_ids, b.document_ids))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("mask", [True, False])
def test_batches_are_the_sampler_s_windows(dataset: PackedDataset, mask: bool) -> None:
    with loader(dataset, mask=mask) as batches:
        for step in range(6):
            windows = [dataset.window(i, mask) for i in step_indices(3, step, 8, len(dataset)).tolist()]
            made = batches.step(step)
            assert [batch.tokens.shape for batch in made] == [(2, SEQUENCE)] * 4
            assert torch.cat([batch.tokens for batch in made]).tolist() == [w.tokens.tolist() for w in windows]
            assert torch.cat([batch.labels for batch in made]).tolist() == [w.labels.tolist() for w in windows]
            documents = [batch.document_ids for batch in made]
            if mask:
                assert torch.cat(documents).tolist() == [w.document_ids.tolist() for w in windows]
                assert {ids.dtype for ids in documents} == {torch.int32}
            else:
                assert documents == [None] * 4
            assert {(batch.tokens.dtype, batch.labels.dtype) for batch in made} == {(torch.int64, torch.int64)}


def test_prefetch_gives_the_same_as_none(dataset: PackedDataset) -> None:
    with loader(dataset) as batches:
        ahead = [batches.step(step) for step in range(8)]
        # Never the step that was prepared: each is made on the spot, but for the first, which was read last.
        backwards = [batches.step(step) for step in reversed(range(8))]
    for step in range(8):
        with loader(dataset) as fresh:
            assert same(fresh.step(step), ahead[step])
        assert same(backwards[7 - step], ahead[step])
    assert not same(ahead[0], ahead[1])


def test_the_next_step_is_made_in_the_background_once(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, str]] = []
    real = TrainLoader._make

    def spy(self: TrainLoader, step: int) -> list[Batch]:
        made.append((step, threading.current_thread().name))
        return real(self, step)

    monkeypatch.setattr(TrainLoader, "_make", spy)
    with loader(dataset) as batches:
        for step in range(3):
            found = batches.step(step)
            assert batches.step(step) is found, "a step that is computed again, twice"
            assert batches.step(step) is found
    here = threading.current_thread().name
    # Step 3 may or may not have been begun when the loader closed.
    assert made[:3] == [(0, here), (1, "prefetch_0"), (2, "prefetch_0")] and made[3:] in ([], [(3, "prefetch_0")])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_have_the_global_batch(dataset: PackedDataset, world: int) -> None:
    rows = []
    for rank in range(world):
        with loader(dataset, rank, world) as batches:
            batches.step(0)
            rows += [row for batch in batches.step(1) for row in batch.tokens.tolist()]
    order = step_indices(3, 1, 8, len(dataset)).tolist()
    assert rows == [dataset.window(index).tokens.tolist() for index in order]


def test_an_error_in_the_background_is_raised_by_the_step_that_needs_it(
    dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PackedDataset.window
    broken = set(step_indices(3, 1, 8, len(dataset)).tolist()) - set(step_indices(3, 0, 8, len(dataset)).tolist())
    threads = []

    def window(self: PackedDataset, index: int, mask_documents: bool = False) -> Window:
        if index in broken:
            threads.append(threading.current_thread().name)
            raise DataError("shards: holds token 7")
        return real(self, index, mask_documents)

    monkeypatch.setattr(PackedDataset, "window", window)
    with loader(dataset) as batches:
        first = batches.step(0)
        with pytest.raises(DataError, match="holds token 7"):
            batches.step(1)
        assert threads == ["prefetch_0"]
        with pytest.raises(DataError, match="holds token 7"):  # again, not something older or newer
            batches.step(1)
        broken.clear()
        with loader(dataset) as fresh:
            assert same(batches.step(1), fresh.step(1))
        assert same(batches.step(0), first)


def test_an_unneeded_error_is_not_raised(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainLoader._make

    def make(self: TrainLoader, step: int) -> list[Batch]:
        if step == 1:
            raise DataError("step 1 is broken")
        return real(self, step)

    monkeypatch.setattr(TrainLoader, "_make", make)
    with loader(dataset) as batches:
        batches.step(0)
        assert len(batches.step(5)) == 4


def test_close_ends_the_thread_and_is_final(dataset: PackedDataset) -> None:
    before = threading.active_count()
    batches = loader(dataset)
    batches.step(0)
    assert threading.active_count() == before + 1
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="the loader is closed"):
        batches.step(1)


@pytest.mark.parametrize(("batch", "world", "micro"), [(8, 3, 1), (8, 1, 3), (2, 2, 2)])
def test_a_bad_split_is_refused_before_any_thread(
    dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch, batch: int, world: int, micro: int
) -> None:
    def refuse(*_: object, **__: object) -> ThreadPoolExecutor:
        raise AssertionError("a thread was started")

    monkeypatch.setattr("pipeline.data.loader.ThreadPoolExecutor", refuse)
    with pytest.raises(ConfigError, match=f"train.global_batch: {batch} is not a multiple of {world} data-parallel"):
        loader(dataset, 0, world, batch, micro)


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    data = PackedDataset(make_shards(tmp_path / "one", [[9] * 8]), SEQUENCE)
    with loader(data, batch=6) as batches:
        made = torch.cat([batch.tokens for batch in batches.step(0)])
    starts = np.array([data.window(index).tokens for index in (0, 1)])
    assert made.shape == (6, SEQUENCE) and {tuple(row) for row in made.tolist()} <= {tuple(row) for row in starts}
