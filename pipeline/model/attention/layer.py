"""Self-attention of a Llama layer: megatron's projections, our RoPE and S² core.

What every layer of a micro-batch shares (cos/sin, segment layout, attention kind) travels as one `AttentionContext` in
the argument megatron-core threads through block, layer and recompute for packed-sequence parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.utils import get_pg_rank

from parallel.axes.context import Exchange
from parallel.axes.halo_plan import Region
from parallel.world.context_shard import ContextShard
from pipeline.model.attention.local import attend
from pipeline.model.attention.sharded import context_attend
from pipeline.model.layers.recipe import Make, Recipe, give_recipe, recipe_of
from pipeline.model.layers.rotary import apply_rope, split_and_rotate
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout, head_plan, layer_rule


class Past(Protocol):
    """What a streamed chunk knows of the tokens before it (`model.streaming`)."""

    def exchange(self, layer: int, heads: HeadPlan, reads: Sequence[Region]) -> Exchange:
        """Of layer number `layer`, counted from 0 in the whole model, for calls that read these keys and values."""

    def leaving(self, layer: int) -> int | None:
        """How many of the chunk's last tokens are wanted of what a layer makes (of -1: of what enters the first one).

        None: all.
        """


@dataclass(frozen=True)
class AttentionContext:
    """What all layers share for one micro-batch."""

    spec: AttentionSpec
    layout: SequenceLayout
    """Of the whole sequence, also where this rank holds a shard of it."""
    cos: torch.Tensor
    """RoPE cosines of the local positions, fp32, as `rotary.rope_tables` returns them."""
    sin: torch.Tensor
    """RoPE sines, likewise."""
    shard: ContextShard | None = None
    """This rank's tokens under context parallelism or streaming; None: all of them."""
    past: Past | None = None
    """Where a streamed chunk has its halos from; None: the whole sequence is at work."""


def _flat(sources: Sequence[torch.Tensor], start: int, stop: int, make: Make) -> torch.Tensor:
    return make(sources, start, stop).flatten(2)


class CoreAttention(torch.nn.Module):
    """S² or full attention over the local heads; has no parameters.

    Built by megatron's `SelfAttention` with the keyword arguments it gives any core attention; those that concern
    kernels of its own are accepted and unused.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any,
        layer_number: int,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__()
        self.layer = layer_number - 1  # megatron counts from 1
        assert config.num_query_groups is not None
        self.softmax_scale = softmax_scale
        self.total_heads, self.total_kv_heads = config.num_attention_heads, config.num_query_groups
        world = pg_collection.tp.size()
        self.local_heads = self.total_heads // world
        self.first_head = get_pg_rank(pg_collection.tp) * self.local_heads
        self._plans: dict[str, HeadPlan] = {}

    def heads(self, spec: AttentionSpec) -> HeadPlan:
        """Which local heads are shifted in this layer, by their global index."""
        rule = layer_rule(spec.shifted_heads, self.layer)
        if rule not in self._plans:
            self._plans[rule] = head_plan(
                self.first_head, self.local_heads, self.total_heads, self.total_kv_heads, rule
            )
        return self._plans[rule]

    def forward(
        self, q_SBHD: torch.Tensor, k_SBKD: torch.Tensor, v_SBKD: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """q [S, B, Hq, D], k and v [S, B, Hkv, D] with RoPE applied, local tokens and heads -> [S, B, Hq * D]."""
        plan = self.heads(context.spec)
        layout, spec, scale = context.layout, context.spec, self.softmax_scale
        if context.shard is None:
            mixed = attend(q_SBHD, k_SBKD, v_SBKD, layout, spec, plan, scale)
        else:
            past, shard, cut = context.past, context.shard, False
            exchange = None if past is None else lambda reads: past.exchange(self.layer, plan, reads)
            if past is not None and q_SBHD.shape[0] < shard.tokens:
                shard, cut = shard.last(q_SBHD.shape[0]), True
            mixed = context_attend(q_SBHD, k_SBKD, v_SBKD, layout, spec, plan, shard, scale, exchange, cut)
        flat, recipe = mixed.flatten(2), recipe_of(mixed)
        if recipe is not None:
            give_recipe(flat, Recipe(recipe.sources, partial(_flat, make=recipe.make)))
        return flat


class LongAttention(SelfAttention):
    """megatron's `SelfAttention` (fused projections, sharding) with true-position RoPE and the S² core.

    Args:
        fused_rope: use RoPE's kernel.
        fused_qkv: cut the fused projection and apply RoPE in one kernel.
    """

    def __init__(self, *args: Any, fused_rope: bool = True, fused_qkv: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused_rope, self.fused_qkv = fused_rope, fused_qkv

    def forward(  # megatron's dozen inference arguments have no meaning here
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, H] -> ([S, B, H], bias or None)."""
        assert packed_seq_params is not None, "LlamaChunk passes the AttentionContext here"
        context = packed_seq_params
        mixed = self.core_attention(*self._rotated(hidden_states, context), context)
        wanted = None if context.past is None else context.past.leaving(self.core_attention.layer)
        return self.linear_proj(mixed if wanted is None else mixed[mixed.shape[0] - wanted :])

    def keys_alone(self, hidden_states: torch.Tensor, context: AttentionContext) -> None:
        """Make keys and values, and park what later chunks read of them: all that a first pass wants of a last layer.

        Args:
            hidden_states: normed, [S, B, H].
        """
        assert context.past is not None, "of a streamed chunk"
        _, key, value = self._rotated(hidden_states, context)
        core = self.core_attention
        context.past.exchange(core.layer, core.heads(context.spec), ()).send(key, value)

    def _rotated(
        self, hidden_states: torch.Tensor, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[S, B, H] -> queries [S, B, Hq, D], keys and values [S, B, Hkv, D], with RoPE.

        Of the context's last tokens, where fewer than those are given.
        """
        if self.fused_qkv:
            fused, _ = self.linear_qkv(hidden_states)
            cos, sin = _last_positions(context, fused.shape[0])
            groups, heads = self.num_query_groups_per_partition, self.num_attention_heads_per_partition
            # RoPE comes after the norms of heads, which the kernel does not know.
            normed = self.q_layernorm is not None
            parts = None if normed else split_and_rotate(fused, groups, heads, cos, sin)
            if parts is not None:
                return parts
            fused = fused.unflatten(-1, (groups, heads // groups + 2, -1))
            query, key, value = fused.split((heads // groups, 1, 1), dim=3)
            query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
            if normed:
                # A norm keeps its input: of a view, that would be the whole fused projection.
                query, key = self.q_layernorm(query.contiguous()), self.k_layernorm(key.contiguous())
        else:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
            cos, sin = _last_positions(context, query.shape[0])
        query, key = (apply_rope(x, cos, sin, self.fused_rope) for x in (query, key))
        # A view would keep the whole fused projection alive until the backward, of which it is a tenth or less (GQA).
        return query, key, value.clone(memory_format=torch.contiguous_format)


def _last_positions(context: AttentionContext, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE's tables [S, D/2] of the last so many tokens."""
    cos, sin = context.cos, context.sin
    return (cos, sin) if len(cos) == tokens else (cos[len(cos) - tokens :], sin[len(sin) - tokens :])
