"""A Llama layer that follows its own recompute policy."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from pipeline.model.attention.layer import AttentionContext
from pipeline.model.layers.norm import StreamNorm
from pipeline.model.layers.residual import add_before
from pipeline.planning.recompute import RecomputePolicy


class LlamaLayer(TransformerLayer):
    """megatron's layer, checkpointed or not by itself: a mix over layers is then a list of policies.

    megatron's own switch (`recompute_granularity`) is one for all layers, or for the first so many of a stage.
    """

    def __init__(self, *args: Any, recompute: RecomputePolicy, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute = recompute
        if isinstance(self.pre_mlp_layernorm, StreamNorm):
            self.self_attn_bda = add_before(self.pre_mlp_layernorm)

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, H] -> ([S, B, H], None).

        Around the call and not inside `forward`: hooks (engine zero3's, the watch's) run in the recomputation too.
        """
        if self.recompute is not RecomputePolicy.FULL or not self.training:
            result: tuple[torch.Tensor, torch.Tensor | None] = super().__call__(hidden_states=hidden_states, **kwargs)
            return result

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return super(LlamaLayer, self).__call__(hidden_states=hidden, **kwargs)[0]

        return tensor_parallel.checkpoint(run, False, hidden_states), None

    def forward(
        self, hidden_states: torch.Tensor, packed_seq_params: AttentionContext | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, H] -> ([S, B, H], None); a token of any value where a first pass over a chunk wants keys alone."""
        layer = self.self_attention.core_attention.layer
        past = None if packed_seq_params is None else packed_seq_params.past
        if past is None or past.leaving(layer) != 0:
            return super().forward(hidden_states=hidden_states, packed_seq_params=packed_seq_params, **kwargs)
        if past.leaving(layer - 1) != 0:
            normed = self.input_layernorm(hidden_states)
            self.self_attention.keys_alone(normed[0] if isinstance(normed, tuple) else normed, packed_seq_params)
        # The final norm wants something to norm.
        return hidden_states[-1:], None
