"""Segments, head blocks and layouts of S²-Attn, by hand-worked cases and by invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError, DataError
from pipeline.planning.attention_layout import (
    AttentionSpec,
    HeadBlock,
    HeadPlan,
    SequenceLayout,
    head_plan,
    segments,
)
from tests.numerics.attention_oracle import is_shifted


def test_segments_are_the_papers_flash_path() -> None:
    assert segments(8192, 2048, False) == [(0, 2048), (2048, 4096), (4096, 6144), (6144, 8192)]
    assert segments(8192, 2048, True) == [(0, 1024), (1024, 3072), (3072, 5120), (5120, 7168), (7168, 8192)]


@pytest.mark.parametrize(
    ("sequence", "group", "shifted", "expected"),
    [
        (1, 4, False, [(0, 1)]),
        (1, 4, True, [(0, 1)]),
        (2, 4, True, [(0, 2)]),
        (3, 4, True, [(0, 2), (2, 3)]),
        (9, 4, False, [(0, 4), (4, 8), (8, 9)]),
        (9, 4, True, [(0, 2), (2, 6), (6, 9)]),
        (7, 6, True, [(0, 3), (3, 7)]),
    ],
)
def test_segments_of_awkward_lengths(sequence: int, group: int, shifted: bool, expected: list[tuple[int, int]]) -> None:
    assert segments(sequence, group, shifted) == expected


@pytest.mark.parametrize("group", [-2, 0, 1, 3])
def test_group_must_be_even_and_positive(group: int) -> None:
    with pytest.raises(ConfigError, match="group_size"):
        segments(8, group, False)
    with pytest.raises(ConfigError, match="group_size"):
        AttentionSpec("s2", group)


def test_spec_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="attention.kind"):
        AttentionSpec("sparse", 4)
    with pytest.raises(ConfigError, match="shifted_heads"):
        AttentionSpec("s2", 4, "lower")


def test_head_blocks_by_hand() -> None:
    def head_blocks(*heads: Any) -> list[HeadBlock]:
        return list(head_plan(*heads).blocks)

    # Llama-2-70B: 64 heads over 8 KV heads split cleanly into two calls.
    assert head_blocks(0, 64, 64, 8, "upper_half") == [HeadBlock(0, 32, 0, 4, False), HeadBlock(32, 64, 4, 8, True)]
    # Its TP 8 ranks hold one KV group each: one call, shifted on the upper four.
    assert head_blocks(24, 8, 64, 8, "upper_half") == [HeadBlock(0, 8, 0, 1, False)]
    assert head_blocks(32, 8, 64, 8, "upper_half") == [HeadBlock(0, 8, 0, 1, True)]
    # SmolLM2: 9 heads, 3 KV heads; KV head 1 straddles the split and alone is read twice.
    assert head_blocks(0, 9, 9, 3, "upper_half") == [
        HeadBlock(0, 3, 0, 1, False),
        HeadBlock(3, 4, 1, 2, False),
        HeadBlock(4, 6, 1, 2, True),
        HeadBlock(6, 9, 2, 3, True),
    ]
    assert head_blocks(3, 3, 9, 3, "upper_half") == [HeadBlock(0, 1, 0, 1, False), HeadBlock(1, 3, 0, 1, True)]
    assert head_blocks(0, 5, 5, 1, "upper_half") == [HeadBlock(0, 2, 0, 1, False), HeadBlock(2, 5, 0, 1, True)]
    assert head_blocks(0, 6, 6, 3, "alternate") == [
        HeadBlock(0, 2, 0, 1, False),
        HeadBlock(2, 4, 1, 2, True),
        HeadBlock(4, 6, 2, 3, False),
    ]
    assert head_blocks(0, 4, 4, 1, "alternate") == [HeadBlock(0, 4, 0, 1, False)]


def test_full_attention_is_one_block() -> None:
    assert head_plan(0, 9, 9, 3, "upper_half").full_blocks == (HeadBlock(0, 9, 0, 3, False),)


@pytest.mark.parametrize(
    "arguments", [(0, 4, 4, 3, "upper_half"), (2, 4, 4, 2, "upper_half"), (0, 0, 4, 2, "upper_half"), (0, 4, 4, 2, "x")]
)
def test_impossible_heads_are_errors(arguments: tuple[int, int, int, int, str]) -> None:
    with pytest.raises(ConfigError):
        head_plan(*arguments)


@st.composite
def head_slices(draw: st.DrawFn) -> tuple[int, int, int, int]:
    kv_heads = draw(st.integers(1, 6))
    heads = kv_heads * draw(st.integers(1, 5))
    first = draw(st.integers(0, heads - 1))
    return first, draw(st.integers(1, heads - first)), heads, kv_heads


@given(head_slices(), st.sampled_from(["upper_half", "alternate", "none", "all"]))
def test_blocks_cover_each_head_once_with_its_global_shift(case: tuple[int, int, int, int], rule: str) -> None:
    first, local, heads, kv_heads = case
    ratio = heads // kv_heads
    blocks = head_plan(*case, rule).blocks
    seen = []
    for block in blocks:
        queries = range(block.q_start, block.q_stop)
        # One GQA call: each KV head serves the same number of the block's query heads, in order.
        per_kv, rest = divmod(len(queries), block.kv_stop - block.kv_start)
        assert rest == 0
        for index, head in enumerate(queries):
            seen.append(head)
            assert block.kv_start + index // per_kv == (first + head) // ratio - first // ratio
            assert block.shifted == is_shifted(first + head, heads, kv_heads, rule)
    assert seen == list(range(local))
    if rule != "upper_half" or (heads // 2) % ratio == 0:
        assert not HeadPlan.reuses_kv(tuple(blocks)), "no KV head straddles the split, so none is read twice"


def test_layout_segments_with_padding_and_documents() -> None:
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [0] * 8], bool)
    documents = np.array([[7, 7, 7, 7, 7, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8])
    layout = SequenceLayout.build(3, 8, mask, documents)
    assert layout.padded and not layout.is_dense
    assert layout.segments(None) == ((0, 2, 5), (0, 5, 8), (1, 0, 3), (1, 3, 5))
    assert layout.segments(4) == ((0, 2, 5), (0, 5, 6), (0, 6, 8), (1, 0, 3), (1, 3, 4), (1, 4, 5))
    assert layout.segments(4, True) == ((0, 2, 4), (0, 4, 5), (0, 5, 8), (1, 0, 2), (1, 2, 3), (1, 3, 5))


def test_document_ids_need_only_be_runs() -> None:
    layout = SequenceLayout.build(1, 6, document_ids_BS=np.array([[5, 5, 0, 0, 5, 5]]))
    assert layout.segments(None) == ((0, 0, 2), (0, 2, 4), (0, 4, 6))
    assert not layout.padded


def test_regular_input_builds_the_dense_layout() -> None:
    ones = torch.ones(2, 6, dtype=torch.bool)
    assert SequenceLayout.build(2, 6, ones, torch.zeros(2, 6, dtype=torch.int64)) == SequenceLayout.dense(2, 6)
    assert SequenceLayout.build(2, 6).is_dense


def test_malformed_layouts_are_errors() -> None:
    with pytest.raises(DataError, match="Row 1 has padding between"):
        SequenceLayout.build(2, 4, np.array([[1, 1, 1, 1], [1, 0, 1, 1]], bool))
    with pytest.raises(DataError, match="document ids"):
        SequenceLayout.build(2, 4, document_ids_BS=np.zeros((4, 2), int))


def test_dense_calls_are_few() -> None:
    layout = SequenceLayout.dense(1, 8192)
    assert [(s.start, s.length, s.count) for s in layout.spans(2048, False, True)] == [(0, 2048, 4)]
    shifted = layout.spans(2048, True, True)
    assert [(s.start, s.length, s.count) for s in shifted] == [(0, 1024, 1), (1024, 2048, 3), (7168, 1024, 1)]
    # More rows than groups: one call a group over all rows; fewer: one call a row over all groups.
    assert len(SequenceLayout.dense(8, 64).spans(16, False, False)) == 4
    assert len(SequenceLayout.dense(2, 64).spans(16, False, False)) == 2


def test_work_is_done_once_a_layout() -> None:
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, 1]])
    layout = SequenceLayout.build(1, 8, document_ids_BS=documents)
    first = layout.spans(4, True, True)
    assert layout.spans(4, True, True) is first
    assert first[0].edges == (0, 2, 3, 6, 8) and first[0].longest == 3


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([2, 4, 6, 16, None]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_spans_are_the_segments(
    batch: int, sequence: int, group: int | None, shifted: bool, packed: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    mask = np.zeros((batch, sequence), bool)
    for row in range(batch):
        low, high = sorted(generator.integers(0, sequence + 1, 2))
        mask[row, low:high] = True
    documents = np.cumsum(generator.random((batch, sequence)) < 0.15, axis=1)
    for layout in (SequenceLayout.build(batch, sequence, mask, documents), SequenceLayout.dense(batch, sequence)):
        found = []
        for span in layout.spans(group, shifted, packed):
            edges = span.edges or tuple(index * span.length for index in range(span.count + 1))
            assert span.edges is None or packed
            for row in range(span.row_start, span.row_stop):
                found += [
                    (row, span.start + start, span.start + stop) for start, stop in zip(edges, edges[1:], strict=False)
                ]
        assert sorted(found) == sorted(layout.segments(group, shifted))
