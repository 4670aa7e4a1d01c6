"""The frozen MLP that makes gate and up again, tile by tile: they exist for a few thousand tokens at a time.

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
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from torch.autograd.function import once_differentiable

from parallel.axes.tensor import TokenTiles
from pipeline.model.layers.frozen_weight import FrozenWeight, frozen_weight
from pipeline.model.layers.linear import sum_product, tiles_of
from pipeline.model.layers.recipe import Recipe, recipe_of
from pipeline.model.layers.recomputation import placeholder, recomputing
from pipeline.planning.recompute import RecomputePolicy


def _tiles(group: dist.ProcessGroup, own: torch.Tensor, gate_up: FrozenWeight) -> TokenTiles:
    """Of a tile exist gate and up, and the next tile's input or the last one's sums beside its own."""
    width, hidden = gate_up.shape
    return tiles_of(group, own.shape, width + 2 * hidden)


class _FrozenMlp(torch.autograd.Function):
    """[L, B, H] -> [L, B, H]; keeps its input alone, and not even that if a norm can make it again."""

    @staticmethod
    def forward(
        ctx: Any,
        own: torch.Tensor,
        gate_up: FrozenWeight,
        down: FrozenWeight,
        group: dist.ProcessGroup,
        skip: bool,
        recipe: Recipe | None,
        fused: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(*((own,) if recipe is None else recipe.sources))
        ctx.gate_up, ctx.down = gate_up, down
        ctx.group, ctx.make, ctx.fused = group, None if recipe is None else recipe.make, fused
        if skip:
            return placeholder(own, own.shape)
        tiles = _tiles(group, own, gate_up)
        out = own.new_empty(own.shape)
        scatter = tiles.scatter(out)
        gathered = tiles.gather(own)
        gate_up, down = gate_up.at_hand(own.dtype), down.at_hand(own.dtype)
        for span in tiles.spans:
            sum_product(scatter, span, down.swiglu(gate_up.product(next(gathered)), fused), down.product)
        scatter.finish()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        kept = ctx.saved_tensors
        tiles = _tiles(ctx.group, grad, ctx.gate_up)
        grad_own = grad.new_empty(grad.shape)
        scatter = tiles.scatter(grad_own)
        own = kept[0] if ctx.make is None else Recipe(kept, ctx.make).rows
        gathered = tiles.gather(own, grad)
        weights, down = ctx.gate_up.at_hand(grad.dtype), ctx.down.at_hand(grad.dtype)
        for span in tiles.spans:
            # Every tile is let go of as soon as it was used: this is where a layer's memory peaks.
            gate_up = weights.product(next(gathered))
            slope = down.grad_input(next(gathered))
            # The last tile's sums had two products' time.
            scatter.finish()
            gradient = weights.swiglu_gradient(gate_up, slope, ctx.fused)
            del gate_up, slope
            sum_product(scatter, span, gradient, weights.grad_input)
            del gradient
        scatter.finish()
        return grad_own, None, None, None, None, None, None


class _RoundingMlp(torch.autograd.Function):
    """[S, B, H] -> [S, B, H] on one rank, by weights that round what they multiply; keeps gate and up.

    SwiGLU's output and the gradient of gate and up are never written unrounded.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gate_up: FrozenWeight, down: FrozenWeight, fused: bool) -> torch.Tensor:
        wide = gate_up.product(rows)
        ctx.save_for_backward(wide)
        ctx.gate_up, ctx.down, ctx.fused = gate_up, down, fused
        return down.product(down.swiglu(wide, fused))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (wide,) = ctx.saved_tensors
        gradient = ctx.gate_up.swiglu_gradient(wide, ctx.down.grad_input(grads[0]), ctx.fused)
        return ctx.gate_up.grad_input(gradient), None, None, None


class TiledMLP(MLP):
    """megatron's MLP; tiled where gate and up are made again and its weights are frozen without adapters.

    With adapters it is checkpointed, if the whole layer is not. Elsewhere gate and up are kept for the backward.

    Args:
        recompute: of the layer it is in.
        fused: use SwiGLU's kernels in tiles.
        tiled: its linears are ours, and are nothing but products. Others' go the way of those with adapters.
    """

    def __init__(
        self, *args: Any, recompute: RecomputePolicy, fused: bool = True, tiled: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.recompute, self.fused, self.tiled = recompute, fused, tiled

    def forward(  # megatron's arguments for experts have no meaning here
        self, hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[L, B, H] -> ([L, B, H], None); values are arbitrary while recomputing."""
        again = self.recompute in (RecomputePolicy.FULL, RecomputePolicy.GATE_UP)
        weights = self._frozen() if again else None
        if weights is None:
            if self.recompute is RecomputePolicy.GATE_UP and self.training:
                return tensor_parallel.checkpoint(lambda hidden: self._whole(hidden)[0], False, hidden_states), None
            return self._rounded(hidden_states) or self._whole(hidden_states)
        where = self.linear_fc1.tp_group, recomputing(), recipe_of(hidden_states)
        return _FrozenMlp.apply(hidden_states, *weights, *where, self.fused), None

    def _rounded(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None] | None:
        """By weights that round what they multiply; None: they do not, or gate and up do not stay."""
        stay = self.recompute in (RecomputePolicy.NONE, RecomputePolicy.POINTWISE)
        weights = self._frozen() if stay and self.fused else None
        if weights is None or not all(weight.rounds for weight in weights) or self.linear_fc1.tp_group.size() > 1:
            return None
        return _RoundingMlp.apply(hidden_states, *weights, self.fused), None

    def _whole(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All tokens at once, by megatron's own forward."""
        return cast(tuple[torch.Tensor, torch.Tensor | None], super().forward(hidden_states))

    def _frozen(self) -> tuple[FrozenWeight, FrozenWeight] | None:
        """Both weights, if they are frozen and nothing else is here: no adapters, no biases."""
        linears = self.linear_fc1, self.linear_fc2
        if not self.tiled or any(not hasattr(linear, "weight") or linear.bias is not None for linear in linears):
            return None
        gate_up, down = frozen_weight(self.linear_fc1), frozen_weight(self.linear_fc2)
        return None if gate_up is None or down is None else (gate_up, down)
