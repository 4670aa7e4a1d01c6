"""Windows, shifted labels, document ids and masks against plain loops over the whole stream."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import DataError
from pipeline.data.packing import IGNORE, PackedDataset, document_ids
from tests.support.data_helpers import make_shards, stream_of

documents_ = st.lists(st.lists(st.integers(3, 258), max_size=12), min_size=1, max_size=12)


@given(documents=documents_, sequence=st.integers(1, 9), limit=st.integers(1, 40))
def test_windows_equal_a_plain_loop(documents: list[list[int]], sequence: int, limit: int) -> None:
    tokens, owners = stream_of(documents)
    expected = [start for start in range(0, len(tokens), sequence) if start + sequence + 1 <= len(tokens)]
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder, "shards"), documents, limit)
        if not expected:
            with pytest.raises(DataError):
                PackedDataset(shards, sequence)
            return
        data = PackedDataset(shards, sequence)
        assert len(data) == len(expected)
        for index, start in enumerate(expected):
            plain, masked = data.window(index), data.window(index, mask_documents=True)
            assert plain.tokens.tolist() == masked.tokens.tolist() == tokens[start : start + sequence]
            assert plain.document_ids.tolist() == masked.document_ids.tolist() == owners[start : start + sequence]
            assert plain.labels.tolist() == tokens[start + 1 : start + sequence + 1]
            assert masked.labels.tolist() == [
                tokens[place + 1] if owners[place + 1] == owners[place] else IGNORE
                for place in range(start, start + sequence)
            ]
            assert (plain.tokens.dtype, plain.labels.dtype, plain.document_ids.dtype) == (np.int64, np.int64, np.int32)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=15), data=st.data())
def test_document_ids_equal_a_plain_loop(lengths: list[int], data: st.DataObject) -> None:
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    starts = np.cumsum([0, *lengths[:-1]])
    start = data.draw(st.integers(0, len(owners) - 1))
    count = data.draw(st.integers(1, len(owners) - start))
    assert document_ids(starts, start, count).tolist() == owners[start : start + count]


def test_a_masked_window_ignores_exactly_the_ends_of_documents(tmp_path: Path) -> None:
    data = PackedDataset(make_shards(tmp_path / "shards", [[10, 11], [12], [13, 14]]), 3)
    assert len(data) == 2  # 8 tokens: the second window's last label is the stream's seventh token
    first, second = (data.window(index, mask_documents=True) for index in (0, 1))
    assert (first.tokens.tolist(), first.labels.tolist()) == ([10, 11, 2], [11, 2, IGNORE])
    assert (second.tokens.tolist(), second.labels.tolist()) == ([12, 2, 13], [2, IGNORE, 14])
    assert second.document_ids.tolist() == [1, 1, 2]
    assert data.window(0).labels.tolist() == [11, 2, 12]


@pytest.mark.parametrize("index", [-1, 2])
def test_window_out_of_range(tmp_path: Path, index: int) -> None:
    data = PackedDataset(make_shards(tmp_path / "shards", [[10, 11], [12], [13, 14]]), 3)
    with pytest.raises(IndexError, match=f"window {index} of 2"):
        data.window(index)


def test_exactly_one_window_and_one_token_too_few(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", [[5] * 4])
    assert len(PackedDataset(shards, 4)) == 1
    with pytest.raises(DataError, match=r"shards: holds 5 tokens, but one window of 5 needs 6; give more text"):
        PackedDataset(shards, 5)


def test_fingerprint_is_of_content_and_window(tmp_path: Path) -> None:
    one, same = make_shards(tmp_path / "a", [[5] * 8]), make_shards(tmp_path / "b", [[5] * 8])
    other = make_shards(tmp_path / "c", [[5] * 7 + [6]])
    moved = make_shards(tmp_path / "d", [[5] * 3 + [2] + [5] * 4])  # another token
    assert PackedDataset(one, 4).fingerprint == PackedDataset(same, 4).fingerprint
    prints = {PackedDataset(shards, 4).fingerprint for shards in (one, other, moved)}
    assert len({*prints, PackedDataset(one, 3).fingerprint}) == 4


def test_ignore_is_torchs_own() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE
