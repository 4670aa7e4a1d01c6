"""Queries that move: every one is attended once, work is even, and nothing moves where nothing is to be gained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.axes.query_plan import EVEN, LEND_FROM, SLACK, QueryMove, QueryPlan, plan_queries
from pipeline.planning.attention_layout import AttentionSpec, HeadBlock, SequenceLayout, Span, head_plan
from pipeline.planning.context_shards import ShardWork, attended, query_key_pairs, query_moves
from tests.numerics import attention_oracle as oracle

works = st.sampled_from([1, 2, 3, 4, 7, 16]).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.integers(1, 12).flatmap(
            lambda tokens: st.lists(
                st.sampled_from([0, 0, 1, 2, 5, 40, 1000]), min_size=size * tokens, max_size=size * tokens
            )
        ),
    )
)
"""(ranks, work of each token)."""


def after(work: np.ndarray, plan: QueryPlan, size: int, offset: int = 0) -> np.ndarray:
    """Each rank's work, token by token, which also says that every token has one rank."""
    tokens = len(work) // size
    by = np.zeros((size, len(work)), int)
    for rank in range(size):
        for start, stop in plan.kept(rank, offset + rank * tokens, offset + (rank + 1) * tokens):
            by[rank, start - offset : stop - offset] += 1
        for move in plan.borrowed(rank):
            assert (
                move.owner != rank
                and (move.start - offset) // tokens == move.owner == (move.stop - 1 - offset) // tokens
            )
            by[rank, move.start - offset : move.stop - offset] += 1
    assert (by.sum(0) == 1).all(), "each query is attended by one rank"
    return by @ work


@given(works, st.integers(0, 9))
def test_every_query_has_one_rank_and_no_rank_much_more_than_the_mean(case: tuple[int, list[int]], at: int) -> None:
    size, work = case[0], np.array(case[1], np.int64)
    offset = at * len(work)
    plan = plan_queries(work, size, offset)
    assert plan == plan_queries(work.copy(), size, offset)
    totals, mean = after(work, plan, size, offset), -(-int(work.sum()) // size)
    if plan.moves:
        assert totals.max() <= mean + max(int(work.max()), SLACK * mean)
    else:
        # One token may be all that the busiest rank has too much.
        assert totals.max() <= mean + max(int(work.max()), (EVEN - 1) * mean)
    assert all(move.tokens > 0 for move in plan.moves)
    assert len({(move.owner, move.worker) for move in plan.moves}) == len(plan.moves), "one message a pair"
    owners, workers = {move.owner for move in plan.moves}, {move.worker for move in plan.moves}
    assert not owners & workers


@pytest.mark.parametrize("size", [2, 3, 4, 8, 64])
def test_of_one_document_the_end_of_a_shard_moves_to_the_rank_opposite(size: int) -> None:
    tokens = 1024
    plan = plan_queries(np.arange(1, size * tokens + 1), size)
    mean = size * tokens * (size * tokens + 1) / 2 / size
    assert after(np.arange(1, size * tokens + 1), plan, size).max() <= mean * 1.01
    owners = range(-(-size // 2) if size % 2 == 0 else size // 2 + 1, size)
    assert [(m.owner, m.worker, m.stop) for m in plan.moves] == [
        (owner, size - 1 - owner, (owner + 1) * tokens) for owner in owners
    ]
    # In units of a shard: the last rank keeps x of its queries, at which x (2 (c - 1) + x) = c.
    kept = np.sqrt((size - 1) ** 2 + size) - (size - 1)
    assert plan.most() == pytest.approx((1 - kept) * tokens, abs=2)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    size, tokens, batch = draw(st.sampled_from([2, 3, 4, 8])), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    total = size * tokens
    mask, ids = np.ones((batch, total), bool), np.zeros((batch, total), int)
    for row in range(batch):
        left, right = draw(st.integers(0, tokens)), draw(st.integers(0, 2 * tokens))
        mask[row, :left] = mask[row, total - right :] = False
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, 6), min_size=ids.size, max_size=ids.size))
        ids = np.cumsum(np.array(cuts).reshape(ids.shape) == 0, axis=1)
    heads = draw(st.sampled_from([(4, 4), (8, 2), (9, 3), (5, 1)]))
    cut = draw(st.sampled_from([(0, heads[0]), (1, heads[0] - 1)]))
    return {"size": size, "tokens": tokens, "batch": batch, "mask": mask, "ids": ids, "heads": heads, "cut": cut}


@given(layouts())
def test_the_calls_of_all_ranks_are_the_definition_once(case: dict[str, Any]) -> None:
    """Every (row, query head, query, key) of the mask is computed by one rank; and counted."""
    size, tokens, batch = case["size"], case["tokens"], case["batch"]
    total, (first, count) = size * tokens, case["cut"]
    layout = SequenceLayout.build(batch, total, case["mask"], case["ids"])
    spec, heads = AttentionSpec("full", 2, lend_from=0), head_plan(first, count, *case["heads"], "upper_half")
    moves = query_moves(layout, spec, size, tokens)
    assert moves == query_moves(SequenceLayout.build(batch, total, case["mask"], case["ids"]), spec, size, tokens)
    found, by_rank = np.zeros((batch, count, total, total), int), []

    def add(work: ShardWork, begin: int) -> None:
        for block, span in work.local:
            _add_span(found, block, span, begin)
        for (block, straddle), read in zip(work.straddling, work.reads, strict=True):
            assert (read.start, read.stop) == (straddle.start, begin + straddle.at)
            for query in range(begin + straddle.at, begin + straddle.at + straddle.length):
                rows, of_heads = slice(straddle.row_start, straddle.row_stop), slice(block.q_start, block.q_stop)
                found[rows, of_heads, query, straddle.start : query + 1] += 1

    for rank in range(size):
        before = found.sum()
        own, borrowed = attended(
            layout, spec, heads, moves, rank, rank * tokens, (rank + 1) * tokens, packed=rank % 2 == 1
        )
        add(own, rank * tokens)
        for work, move in zip(borrowed, moves.borrowed(rank), strict=True):
            add(work, move.start)
        by_rank.append(int(found.sum() - before))
    allowed = oracle.masks(batch, total, *case["heads"], None, padding=case["mask"], documents=case["ids"])
    assert (found == allowed.numpy()[:, first : first + count]).all()
    assert query_key_pairs(layout, spec, heads, size, tokens) == tuple(by_rank)


def _add_span(found: np.ndarray, block: HeadBlock, span: Span, begin: int) -> None:
    edges = span.edges or tuple(range(0, span.count * span.length + 1, span.length))
    for start, stop in zip(edges, edges[1:], strict=False):
        for query in range(start, stop):
            at = begin + span.start
            rows, heads = slice(span.row_start, span.row_stop), slice(block.q_start, block.q_stop)
            found[rows, heads, at + query, at + start : at + query + 1] += 1


def _documents(*lengths: int) -> SequenceLayout:
    total = sum(lengths)
    return SequenceLayout.build(1, total, None, np.repeat(np.arange(len(lengths)), lengths)[None])


def test_nothing_moves_where_too_little_is_saved() -> None:
    spec, s2 = AttentionSpec("full", 2), AttentionSpec("s2", 8192)
    long, mlperf = SequenceLayout.dense(1, 32768), SequenceLayout.dense(1, 8192)
    assert query_moves(mlperf, spec, 2, 4096).moves == (QueryMove(1, 0, 7095, 8192),)
    assert len(query_moves(long, spec, 8, 4096).moves) == 4
    for layout, of, size in (
        (long, AttentionSpec("full", 2, lend_from=None), 8),
        (long, s2, 8),
        (long, spec, 1),
        # Queries that see few keys: a short sequence, and short documents, however uneven.
        (SequenceLayout.dense(1, 4096), spec, 2),
        (_documents(*[2048] * 4, *[1] * 8192), spec, 2),
    ):
        assert query_moves(layout, of, size, layout.sequence // size) == QueryPlan()
    # Equal documents, a shard each; and one whose end crosses into the next shard.
    assert not query_moves(_documents(*[16384] * 4), spec, 4, 16384).moves
    uneven = query_moves(_documents(16384, 49152), spec, 4, 16384)
    assert uneven.moves and all(move.start >= 32768 for move in uneven.moves)
    # The saved keys a moved query, as the constant says.
    saved = 3 / 8 * 8192**2 - 8192**2 / 4
    assert saved / 1097 == pytest.approx(7650, rel=0.01) and saved / 1097 > LEND_FROM
