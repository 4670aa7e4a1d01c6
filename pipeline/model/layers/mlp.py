"""The frozen MLP of a checkpointed layer, tile by tile: its wide tensors exist for a few thousand tokens at a time.

gate, up and their product are 3 F values a token beside a hidden state of H, and F is 2.7 to 3.5 H: whole, they set
the memory peak of a recomputed layer. Tokens do not meet in an MLP, so that a tile can go all the way through it
(tiling in this place: ALST, arXiv 2506.13996). Its weights being frozen, the backward recomputes gate and up of a tile
and is done with it; the layer's own recomputation then has nothing to compute here. No product is made more often than
without tiles.

Shapes: L own tokens of T tensor-parallel ranks, l of a tile, B batch, H hidden, F local FFN width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import MLP
from torch.autograd.function import once_differentiable

from parallel.axes.tensor import TokenTiles
from pipeline.model.layers.linear import placeholder, product, recomputing, sum_product, tiles_of
from pipeline.model.layers.norm import NormRecipe, recipe_of
from pipeline.model.layers.swiglu import swiglu, swiglu_gradient_


def _tiles(group: dist.ProcessGroup, own: torch.Tensor, gate_up_2FH: torch.Tensor) -> TokenTiles:
    """Of a tile exist gate and up, and the next tile's input or the last one's sums beside its own."""
    width, hidden = gate_up_2FH.shape
    return tiles_of(group, own.shape, width + 2 * hidden)


class _FrozenMlp(torch.autograd.Function):
    """[L, B, H] -> [L, B, H]; keeps its input alone, and not even that if a norm can make it again."""

    @staticmethod
    def forward(
        ctx: Any,
        own: torch.Tensor,
        gate_up_2FH: torch.Tensor,
        down_HF: torch.Tensor,
        group: dist.ProcessGroup,
        skip: bool,
        recipe: NormRecipe | None,
    ) -> torch.Tensor:
        kept = (own,) if recipe is None else (recipe.input_SBH, recipe.weight_H)
        ctx.save_for_backward(gate_up_2FH, down_HF, *kept)
        ctx.group, ctx.eps = group, None if recipe is None else recipe.eps
        if skip:
            return placeholder(own, own.shape)
        tiles = _tiles(group, own, gate_up_2FH)
        out = own.new_empty(own.shape)
        scatter = tiles.scatter(out)
        gathered = tiles.gather(own)
        for span in tiles.spans:
            sum_product(scatter, span, swiglu(product(next(gathered), gate_up_2FH.t())), down_HF.t())
        scatter.finish()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        gate_up_weight, down_weight, *kept = ctx.saved_tensors
        tiles = _tiles(ctx.group, grad, gate_up_weight)
        grad_own = grad.new_empty(grad.shape)
        scatter = tiles.scatter(grad_own)
        own = kept[0] if ctx.eps is None else NormRecipe(kept[0], kept[1], ctx.eps).rows
        gathered = tiles.gather(own, grad)
        for span in tiles.spans:
            # Every tile is let go of as soon as it was used: this is where a layer's memory peaks.
            gate_up = product(next(gathered), gate_up_weight.t())
            slope = product(next(gathered), down_weight)
            # The last tile's sums had two products' time.
            scatter.finish()
            swiglu_gradient_(gate_up, slope, gate_up)
            del slope
            sum_product(scatter, span, gate_up, gate_up_weight)
            del gate_up
        scatter.finish()
        return grad_own, None, None, None, None, None


class TiledMLP(MLP):
    """megatron's MLP; tiled where layers are checkpointed and its weights are frozen without adapters.

    Elsewhere gate and up are kept for the backward, which tiles would only compute again.
    """

    def forward(  # megatron's arguments for experts have no meaning here
        self, hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[L, B, H] -> ([L, B, H], None); values are arbitrary while recomputing."""
        parameters = list(self.parameters())
        frozen = len(parameters) == 2 and not any(parameter.requires_grad for parameter in parameters)
        if self.config.recompute_granularity != "full" or not frozen:
            return cast(tuple[torch.Tensor, torch.Tensor | None], super().forward(hidden_states))
        group = self.linear_fc1.tp_group
        weights = self.linear_fc1.weight, self.linear_fc2.weight
        return _FrozenMlp.apply(hidden_states, *weights, group, recomputing(), recipe_of(hidden_states)), None
