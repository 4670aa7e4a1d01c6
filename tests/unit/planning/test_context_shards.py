"""The halo plan delivers exactly the K and V that the definition asks for; bytes are what docs/ATTENTION.md says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.axes.halo_plan import Region, equal_edges, plan_halos
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout, head_plan
from pipeline.planning.context_shards import (
    halo_needs,
    halo_plan,
    query_key_pairs,
    ring_bytes,
    shard_work,
)
from tests.numerics import attention_oracle as oracle
from tests.support.halos import halo_bytes, halo_formula

Vector = tuple[int, int, int]
"""(row, KV head, token)."""

RULES = ["upper_half", "alternate", "none", "all"]


@dataclass
class Case:
    size: int
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    group: int
    rule: str
    mask: np.ndarray
    ids: np.ndarray

    @property
    def sequence(self) -> int:
        return self.size * self.tokens

    @property
    def args(self) -> tuple[SequenceLayout, AttentionSpec, HeadPlan, int, int]:
        layout = SequenceLayout.build(self.batch, self.sequence, self.mask, self.ids)
        plan = head_plan(0, self.heads, self.heads, self.kv_heads, self.rule)
        return layout, AttentionSpec("s2", self.group, self.rule), plan, self.size, self.tokens

    def sees(self) -> np.ndarray:
        """bool [B, H, S, S] by the definition."""
        shape = (self.batch, self.sequence, self.heads, self.kv_heads, self.group, self.rule)
        return oracle.masks(*shape, self.mask, self.ids).numpy()


@st.composite
def cases(draw: st.DrawFn, regular: bool = False) -> Case:
    size, tokens, batch = draw(st.sampled_from([2, 3, 4, 8])), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    heads, kv_heads = draw(st.sampled_from([(4, 4), (8, 2), (9, 3), (5, 1), (6, 2)]))
    mask, ids = np.ones((batch, size * tokens), bool), np.zeros((batch, size * tokens), int)
    if regular:
        mask[:, size * tokens - draw(st.integers(0, size * tokens - 1)) :] = False
    elif draw(st.booleans()):
        for row in range(batch):
            left, right = draw(st.integers(0, tokens)), draw(st.integers(0, 2 * tokens))
            mask[row, :left] = mask[row, size * tokens - right :] = False
    if not regular and draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, 9), min_size=ids.size, max_size=ids.size))
        ids = np.cumsum(np.array(cuts).reshape(ids.shape) == 0, axis=1)
    group = draw(st.sampled_from([2, 4, 6, 8, 10, 24, 40]))
    return Case(
        size,
        tokens,
        batch,
        heads,
        kv_heads,
        group,
        draw(st.sampled_from(RULES)),
        mask,
        ids,
    )


def vectors(region: Region) -> list[Vector]:
    """What a region holds."""
    return [
        (row, head, token)
        for row in range(region.row_start, region.row_stop)
        for head in range(region.head_start, region.head_stop)
        for token in range(region.start, region.stop)
    ]


@given(cases())
def test_every_rank_gets_exactly_the_keys_its_queries_see(case: Case) -> None:
    plan, sees = halo_plan(*case.args[:3], equal_edges(*case.args[3:])), case.sees()
    for rank in range(case.size):
        first, last = rank * case.tokens, (rank + 1) * case.tokens
        rows, heads, _, keys = np.nonzero(sees[:, :, first:last, :first])
        needed = set(zip(rows.tolist(), (heads * case.kv_heads // case.heads).tolist(), keys.tolist(), strict=True))
        got: list[Vector] = []
        for message in plan.incoming(rank):
            assert message in plan.outgoing(message.sender) and message.vectors > 0
            for piece in message.pieces:
                assert message.sender * case.tokens <= piece.start < piece.stop <= (message.sender + 1) * case.tokens
                got.extend(vectors(piece))
        assert len(got) == len(set(got)), "a vector is sent twice"
        assert set(got) == needed


@given(cases())
def test_the_calls_of_all_ranks_see_what_the_definition_allows(case: Case) -> None:
    """Queries and keys of local and straddling calls, listed one by one, are the definition's table."""
    layout, spec, heads, size, tokens = case.args
    found = np.zeros_like(case.sees())
    for rank in range(size):
        offset = rank * tokens
        work = shard_work(layout, spec, heads, offset, offset + tokens, packed=False)
        for block, span in work.local:
            for index in range(span.count):
                start = offset + span.start + index * span.length
                for query in range(start, start + span.length):
                    box = found[span.row_start : span.row_stop, block.q_start : block.q_stop, query, start : query + 1]
                    assert not box.any()
                    box[:] = True
        for (block, straddle), read in zip(work.straddling, work.reads, strict=True):
            assert (read.start, read.stop) == (straddle.start, offset) and straddle.start < offset
            for query in range(offset, offset + straddle.length):
                box = found[straddle.row_start : straddle.row_stop, block.q_start : block.q_stop, query]
                assert not box[..., straddle.start : query + 1].any()
                box[..., straddle.start : query + 1] = True
    assert np.array_equal(found, case.sees())


@given(cases())
def test_work_is_counted_as_the_definition_counts_it(case: Case) -> None:
    by_query = case.sees().sum((0, 1, 3))
    assert query_key_pairs(*case.args) == tuple(by_query.reshape(case.size, case.tokens).sum(1).tolist())


@given(cases(regular=True))
def test_bytes_are_those_of_the_formula(case: Case) -> None:
    real = int(case.mask[0].sum())
    layout, spec, heads, size, tokens = case.args
    expected = halo_formula(real, case.batch, case.group, heads, size, tokens, 16, 2)
    counted = halo_bytes(layout, spec, heads, size, tokens, 16, 2)
    assert tuple(received for _, received in counted) == expected
    assert sum(sent for sent, _ in counted) == sum(expected)
    assert counted[-1][0] == 0, "nobody comes after the last rank"


LLAMA_70B = {"upper_half": head_plan(0, 64, 64, 8, "upper_half"), "alternate": head_plan(0, 64, 64, 8, "alternate")}


@pytest.mark.parametrize("rule", ["upper_half", "alternate"])
def test_70b_at_32k_over_8_ranks_sends_a_fourteenth_of_ring_attention(rule: str) -> None:
    layout, spec = SequenceLayout.dense(1, 32768), AttentionSpec("s2", 8192, rule)
    counted = halo_bytes(layout, spec, LLAMA_70B[rule], 8, 4096, 128, 2)
    ring = ring_bytes(1, 8, 8, 4096, 128, 2)
    assert ring == 112 * 2**20
    assert [sent for sent, _ in counted] == [ring // 14] * 7 + [0]
    assert [received for _, received in counted] == [0] + [ring // 14] * 7
    assert ring // 14 == 8 * 2**20
    assert tuple(got for _, got in counted) == halo_formula(32768, 1, 8192, LLAMA_70B[rule], 8, 4096, 128, 2)
    # Every rank hears from its predecessor alone.
    messages = halo_plan(layout, spec, LLAMA_70B[rule], equal_edges(8, 4096)).messages
    assert [(message.sender, message.receiver) for message in messages] == [(rank, rank + 1) for rank in range(7)]


@pytest.mark.parametrize("rule", ["upper_half", "alternate"])
@pytest.mark.parametrize(("sequence", "group"), [(32768, 8192), (65536, 8192), (131072, 32768), (8192, 4096)])
def test_work_is_balanced_at_cp_2n_over_g(sequence: int, group: int, rule: str) -> None:
    """All ranks but the first do exactly the same; the first, which has no past, does half of it."""
    size = 2 * sequence // group
    layout, spec = SequenceLayout.dense(1, sequence), AttentionSpec("s2", group, rule)
    work = query_key_pairs(layout, spec, LLAMA_70B[rule], size, sequence // size)
    assert len(set(work[1:])) == 1
    assert 0.5 < work[0] / work[1] < 0.51
    if size >= 8:
        assert max(work) < 1.07 * sum(work) / size


def test_a_shared_kv_head_is_sent_once_with_the_longer_reach() -> None:
    """9 heads on 3 KV heads: KV head 1 serves unshifted heads 3 and shifted heads 4, 5."""
    layout, spec, heads = SequenceLayout.dense(2, 40), AttentionSpec("s2", 16), head_plan(0, 9, 9, 3, "upper_half")
    needs = halo_needs(layout, spec, heads, equal_edges(4, 10))
    # Rank 1 starts at 10: unshifted from 0; shifted from 8.
    assert needs[1] == (Region(0, 2, 0, 2, 0, 10), Region(0, 2, 2, 3, 8, 10))
    # Rank 2 starts at 20: unshifted from 16; shifted from 8.
    assert needs[2] == (Region(0, 2, 0, 1, 16, 20), Region(0, 2, 1, 3, 8, 20))
    assert [message.sender for message in halo_plan(layout, spec, heads, equal_edges(4, 10)).incoming(2)] == [0, 1]


def test_plans_are_remembered_by_the_layout() -> None:
    layout, spec, heads = SequenceLayout.dense(1, 32), AttentionSpec("s2", 8), LLAMA_70B["upper_half"]
    four, two = equal_edges(4, 8), equal_edges(2, 16)
    assert halo_plan(layout, spec, heads, four) is halo_plan(layout, spec, heads, four)
    assert halo_plan(layout, spec, heads, four) is not halo_plan(layout, spec, LLAMA_70B["alternate"], four)
    assert halo_plan(layout, spec, heads, two) != halo_plan(layout, AttentionSpec("s2", 6), heads, two)
    work = shard_work(layout, spec, heads, 8, 16, packed=False)
    assert work is shard_work(layout, spec, heads, 8, 16, packed=False)
    assert work is not shard_work(layout, spec, heads, 16, 24, packed=False)


def test_impossible_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 1 cannot need"):
        plan_halos([[], [Region(0, 1, 0, 1, 3, 5)]], equal_edges(2, 4))
    with pytest.raises(ValueError, match="rank 1 needs part of .* twice"):
        plan_halos([[], [Region(0, 1, 0, 2, 1, 4), Region(0, 1, 1, 2, 3, 4)]], equal_edges(2, 4))
