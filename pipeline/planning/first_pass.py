"""How much of a streamed sequence's chunk its first pass has to compute, layer by layer; no torch (docs/STREAMING.md).

Later chunks read keys and values of a chunk's last tokens alone, in every layer. So the last layer has nothing to make
but those; the layer before it is needed for the tokens that these keys are made of, and so its keys for all that these
tokens' queries see: half a group more a layer further down, until a layer needs the whole chunk.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout, head_plan, layer_rule
from pipeline.planning.context_shards import blocks_of, halo_plan
from pipeline.planning.layer_plan import LayerPlan

COUNTED = 8
"""Chunks over which shares are averaged: off the multiples of a group they differ."""


def tokens_entering(
    layout: SequenceLayout, spec: AttentionSpec, heads: Sequence[HeadPlan], edges: Sequence[int], chunk: int
) -> tuple[int, ...]:
    """Of each layer how many of a chunk's last tokens enter it in the first pass, and at the end 0: none leaves.

    Args:
        layout: of the whole sequence.
        spec: kind s2.
        heads: of every layer.
        edges: chunk c holds tokens [edges[c], edges[c + 1]).
        chunk: which.
    """
    begin, end = edges[chunk], edges[chunk + 1]
    entering = [0]
    for number in range(len(heads) - 1, -1, -1):
        if entering[-1] == end - begin:
            entering.append(end - begin)
            continue
        first = _first_read(layout, spec, heads[number], edges, chunk)
        if entering[-1]:
            first = min(first, _first_seen(layout, spec, heads[number], end - entering[-1]))
        entering.append(end - max(begin, first))
    return tuple(reversed(entering))


def cuts_tokens(tp: int, cp: int, recipe: str) -> bool:
    """Whether layers take fewer tokens than a chunk has: one rank has all of them, and products take any number.

    Args:
        recipe: model.fp8_recipe, whose products do not.
    """
    return tp == cp == 1 and recipe == "none"


def whole(tokens: int, layers: int) -> tuple[int, ...]:
    """The same where all of a chunk's tokens go through all layers but the last, of which keys alone are made."""
    return (*(tokens,) * layers, 0)


def _first_read(layout: SequenceLayout, spec: AttentionSpec, heads: HeadPlan, edges: Sequence[int], chunk: int) -> int:
    """First token of a chunk whose keys later chunks read; the chunk's end if they read none."""

    def make() -> int:
        messages = halo_plan(layout, spec, heads, edges).outgoing(chunk)
        return min((piece.start for message in messages for piece in message.pieces), default=edges[chunk + 1])

    return layout.remember(("first read", spec.group, heads.blocks, tuple(edges), chunk), make)


def _first_seen(layout: SequenceLayout, spec: AttentionSpec, heads: HeadPlan, token: int) -> int:
    """First token whose keys are seen by a query of `token` or of one after it."""
    first = token
    for block in blocks_of(spec, heads):
        cuts = layout.segments(spec.group, block.shifted)
        for row in range(layout.batch):
            # Segments rise within a row, so the first to look at is the one that holds the token, if any does.
            found = bisect_right(cuts, (row, token, layout.sequence)) - 1
            if found >= 0 and cuts[found][0] == row and token < cuts[found][2]:
                first = min(first, cuts[found][1])
    return first


@cache
def share_left(plan: LayerPlan) -> float:
    """Of a chunk's tokens how many a layer hands on in a first pass, on the average over layers and chunks."""
    arch = plan.arch
    if not plan.short_first_pass or plan.stream is None or plan.chunks == 1:
        return 1.0
    if cuts_tokens(plan.tp, plan.cp, plan.fp8_recipe):
        count = min(plan.chunks - 1, COUNTED)
        edges = tuple(range(0, (count + 2) * plan.stream, plan.stream))
        layout, spec = SequenceLayout.dense(1, edges[-1]), plan.attention
        rules = [layer_rule(spec.shifted_heads, layer) for layer in range(arch.layers)]
        heads = [head_plan(0, arch.heads, arch.heads, arch.kv_heads, rule) for rule in rules]
        found = [tokens_entering(layout, spec, heads, edges, chunk) for chunk in range(count)]
    else:
        found = [whole(plan.stream, arch.layers)]
    return sum(sum(each[1:]) for each in found) / (plan.stream * arch.layers * len(found))
