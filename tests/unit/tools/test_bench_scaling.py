"""Counted work against what the plan says of it: products by parameters, attention by pairs, bytes by the halo."""

from __future__ import annotations

import argparse

import pytest
import torch

from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout
from pipeline.planning.balance import attention_work
from pipeline.planning.context_shards import query_moves
from tools.bench.scaling import count, rows_of
from tools.support.shapes import llama2

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts without a GPU")


def test_a_layers_work_is_what_its_sizes_say() -> None:
    args = argparse.Namespace(
        model="llama2-70b", tokens=[4096, 8192], tp=[1], cp=[4], group=2048, attention="s2", recompute="none"
    )
    short, long = rows_of(args)
    arch, rank_tokens = llama2("70b", 1), 1024
    matrices = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    # Forward and input gradients of frozen matrices; LoRA's own add a thousandth.
    assert short["products TFLOP"] * 1e12 == pytest.approx(4 * rank_tokens * matrices, rel=0.003)
    pairs = max(attention_work(arch, 4096, AttentionSpec("s2", 2048), 1, 4)[0])
    assert short["attention TFLOP"] * 1e12 == pytest.approx(14 * 128 * pairs, rel=1e-9)
    # Half a group of K and V of the shifted half of 8 heads, in bf16; the last rank sends their gradients back.
    assert short["sent MiB"] * 2**20 == 1024 * 4 * 128 * 2 * 2
    products, attention, sent = (float(word) for word in long["grows"].split())
    assert products == 1.0 and sent == 0.0 and 0.95 < attention < 1.2


def test_recomputation_counts_what_it_makes_again_and_full_attention_is_quadratic() -> None:
    arch, spec = llama2("7b", 1), AttentionSpec("s2", 512)
    kept, again = (count(arch, 2048, spec, 1, 1, policy) for policy in ("none", "gate_up"))
    wide = 2 * 2048 * 2 * 11008 * 4096
    assert again.products - kept.products == wide and again.attention == kept.attention
    whole = count(arch, 2048, AttentionSpec("full", 512), 1, 1, "full")
    assert whole.attention == 128 * 32 * 2048 * 2049 // 2 * (14 + 4)
    assert kept.sent == 0 and whole.products > again.products


def test_full_attention_over_two_ranks_is_half_of_it_each_and_sends_queries_for_it() -> None:
    """Counted where torch calls the kernels: contiguous shards leave one rank three quarters."""
    arch, even = llama2("7b", 1), AttentionSpec("full", 2, lend_from=0)
    alone = 14 * 128 * 32 * 2048 * 2049 // 2
    found = {}
    for spec in (even, AttentionSpec("full", 2, lend_from=None)):
        found[spec.lend_from] = counted = count(arch, 2048, spec, 1, 2, "none")
        assert counted.attention == 14 * 128 * max(attention_work(arch, 2048, spec, 1, 2)[0])
    assert found[0].attention / alone == pytest.approx(1 / 2, rel=2e-3)
    assert found[None].attention / alone == pytest.approx(3 / 4, rel=2e-3)
    # Queries and the gradients of their outputs, or what comes home for them: one vector a head and way.
    moved = query_moves(SequenceLayout.dense(1, 2048), even, 2, 1024).most()
    assert found[0].sent - found[None].sent == 2 * moved * 32 * 128 * 2
    assert found[0].products == found[None].products
