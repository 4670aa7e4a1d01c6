"""Bytes that context-parallel attention moves: counted from the plans, and those of S²'s halos in closed form."""

from __future__ import annotations

from parallel.axes.halo_plan import equal_edges
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout
from pipeline.planning.context_shards import halo_plan, query_moves


def halo_bytes(
    layout: SequenceLayout,
    spec: AttentionSpec,
    heads: HeadPlan,
    size: int,
    tokens: int,
    head_dim: int,
    element_size: int,
) -> tuple[tuple[int, int], ...]:
    """(sent, received) bytes of K and V of each rank in one layer's forward pass, from the plan.

    S²: the halo. Full attention: the all-gather, in which each rank's shard reaches every other rank, and of the
    queries that move one vector each way: owners send queries and receive outputs, workers the reverse.
    """
    vector = head_dim * element_size
    if spec.kind == "full":
        last = heads.full_blocks[-1]
        shard = 2 * tokens * layout.batch * last.kv_stop * vector * (size - 1)
        moved = [0] * size
        for move in query_moves(layout, spec, size, tokens).moves:
            for rank in (move.owner, move.worker):
                moved[rank] += move.tokens * layout.batch * last.q_stop * vector
        return tuple((shard + more, shard + more) for more in moved)
    plan = halo_plan(layout, spec, heads, equal_edges(size, tokens))
    return tuple(
        (
            vector * sum(message.vectors for message in plan.outgoing(rank)),
            vector * sum(message.vectors for message in plan.incoming(rank)),
        )
        for rank in range(size)
    )


def halo_formula(
    sequence: int, batch: int, group: int, heads: HeadPlan, size: int, tokens: int, head_dim: int, element_size: int
) -> tuple[int, ...]:
    """Bytes of K and V that each rank receives a layer, in closed form, for one right-padded document a row.

    Rank c's first token is t = c L. Unshifted heads reach back t mod G tokens, shifted ones t if t < G/2 and else
    (t - G/2) mod G, neither if t lies beyond the `sequence` real tokens; a KV head that both kinds read counts the
    longer reach once. Bytes: 2 (K, V) x batch x D x element size x the sum of the reaches over the KV heads.
    """
    half = group // 2
    found = []
    for rank in range(size):
        first = rank * tokens
        reach = {False: first % group, True: first if first < half else (first - half) % group}
        by_head: dict[int, int] = {}
        for block in heads.blocks:
            for head in range(block.kv_start, block.kv_stop):
                by_head[head] = max(by_head.get(head, 0), reach[block.shifted])
        vectors = sum(by_head.values()) if first < sequence else 0
        found.append(2 * batch * head_dim * element_size * vectors)
    return tuple(found)
