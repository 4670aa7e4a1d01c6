"""How many tokens a streamed chunk's first pass computes, against which tokens later chunks' keys are made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given

from parallel.axes.halo_plan import equal_edges
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan, layer_rule
from pipeline.planning.first_pass import share_left, tokens_entering, whole
from tests.unit.planning.test_context_shards import Case, cases
from tests.unit.planning.test_stream import plan_of

LAYERS = 4


def needed(sees_BHSS: np.ndarray, begin: int, end: int) -> list[int]:
    """Of each layer the last tokens of [begin, end) that have to enter it, by walking back from what is read.

    Tokens of all rows enter a layer together.
    """
    reads = sees_BHSS.any((0, 1))
    entering = [0]
    for _ in range(LAYERS):
        queries = [*range(end - entering[-1], end), *range(end, len(reads))]
        read = reads[queries, begin:end].any(0).nonzero()[0]
        first = min([begin + int(key) for key in read[:1]] + [end - entering[-1]])
        entering.append(end - first)
    return entering[::-1]


@given(cases())
def test_no_more_and_no_less_than_is_read(case: Case) -> None:
    layout, spec, heads, size, tokens = case.args
    edges = equal_edges(size, tokens)
    for chunk in range(size - 1):
        found = tokens_entering(layout, spec, [heads] * LAYERS, edges, chunk)
        assert list(found) == needed(case.sees(), edges[chunk], edges[chunk + 1])


def test_half_a_group_more_a_layer_further_down() -> None:
    """Llama-3-8B, groups of 8192: the first pass over a chunk of 32768 does without four and a half of its layers."""
    layout, spec = SequenceLayout.dense(1, 1 << 20), AttentionSpec("s2", 8192)
    heads = [head_plan(0, 32, 32, 8, "upper_half")] * 32
    found = tokens_entering(layout, spec, heads, equal_edges(32, 32768), 7)
    assert found[-9:] == (32768, 28672, 24576, 20480, 16384, 12288, 8192, 4096, 0) and set(found[:-9]) == {32768}
    assert sum(32768 - tokens for tokens in found[1:]) / 32768 == pytest.approx(4.5)
    assert found[:-1] != whole(32768, 32)[:-1] == (32768,) * 32


def test_layers_that_take_turns() -> None:
    """Under odd_layers the odd ones, which are shifted, alone have a halo at the edge of groups."""
    layout, spec = SequenceLayout.dense(1, 256), AttentionSpec("s2", 16, "odd_layers")
    heads = [head_plan(0, 4, 4, 2, layer_rule("odd_layers", layer)) for layer in range(6)]
    assert tokens_entering(layout, spec, heads, equal_edges(4, 64), 1) == (48, 40, 32, 24, 16, 8, 0)
    assert tokens_entering(layout, spec, heads[:5], equal_edges(4, 64), 1) == (32, 24, 16, 8, 0, 0)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        (("train.stream=16384",), 1 + 0.75 + 0.5 + 0.25),
        (("train.stream=32768",), 4.5),
        (("train.stream=8192",), 1 + 0.5),
        (("train.stream=16384", "model.fp8_recipe=mxfp8", "model.family=te"), 1),
        (("train.stream=16384", "lora.dropout=0.1"), 0),
        (("train.stream=16384", "train.without=[short_first_pass]"), 0),
        (("train.stream=null",), 0),
    ],
)
def test_how_many_of_the_layers_a_first_pass_does_without(settings: tuple[str, ...], layers: float) -> None:
    """Of Llama-3-8B's 32, groups of 8192."""
    assert 32 * (1 - share_left(plan_of(*settings).layer)) == pytest.approx(layers)


def test_over_several_ranks_all_tokens_go_through_all_layers_but_the_last() -> None:
    plan = plan_of("train.stream=16384").layer
    for several in (dataclasses.replace(plan, tp=8), dataclasses.replace(plan, cp=2)):
        assert 32 * (1 - share_left(several)) == pytest.approx(1)
