"""Frozen parallel linears, tile by tile, and the last product of a layer, which a recomputation need not repeat.

Under tensor + sequence parallelism a column-parallel linear gathers tokens and a row-parallel one sums and scatters
them; `TokenTiles` does both beside the products (tensor parallelism: arXiv 1909.08053; sequence parallelism:
2205.05198, section 4). The weights are frozen, so nothing is kept for the backward but they themselves.

A checkpointed layer runs a second time in the backward to restore what its gradients need. The values that leave the
layer are not among them: they exist already. So the product that makes them is skipped then, and only its place in the
graph is kept. An adapter beside it still runs: its gradients need what it makes.

Shapes: S tokens of all T ranks, L = S / T own ones, B batch, I input width, O output width; widths are local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from parallel.axes.tensor import Span as Tokens
from parallel.axes.tensor import TileScatter, TokenTiles
from pipeline.model.layers.frozen_weight import FrozenWeight, frozen_weight
from pipeline.model.layers.recomputation import placeholder, recomputing
from pipeline.planning.tile_size import tile_tokens


def tiles_of(group: dist.ProcessGroup, shape: Sequence[int], width: int) -> TokenTiles:
    """How own tokens are cut.

    Args:
        group: tensor-parallel ranks.
        shape: [L, B, any] of a rank's own tokens; a tile has those of all B sequences.
        width: columns of all that exists of a tile at once.
    """
    return TokenTiles(group, shape[0], tile_tokens(width, dist.get_world_size(group)) // prod(shape[1:-1]))


def _product_tiles(group: dist.ProcessGroup, shape: Sequence[int], weight: FrozenWeight) -> TokenTiles:
    """For one product: the next tile's input or the last one's sums exist beside it. Alone, nothing does: one tile."""
    if dist.get_world_size(group) == 1:
        return TokenTiles(group, shape[0], shape[0])
    return tiles_of(group, shape, 2 * max(weight.shape))


Product = Callable[[Any, torch.Tensor | None], torch.Tensor]
"""`FrozenWeight.product` or `FrozenWeight.grad_input`: (rows, out) -> rows."""


def product_into(
    tiles: TokenTiles, span: Tokens, everything: torch.Tensor, rows: torch.Tensor, product: Product
) -> None:
    """A gathered tile's product, [T l, B, O], written where it belongs in all ranks' tokens [S, B, O]."""
    target = tiles.view(everything, span).flatten(1, -2)
    product(rows.view(*target.shape[:2], -1), target)


def sum_product(scatter: TileScatter, span: Tokens, rows: Any, product: Product) -> None:
    """A gathered tile's product, summed over the ranks; `rows` are what the product takes."""
    scatter.put(span, product(rows, scatter.target(span)))


def sum_product_of(
    scatter: TileScatter, tiles: TokenTiles, span: Tokens, everything: torch.Tensor, product: Product
) -> None:
    """The same of a tile of all ranks' tokens [S, B, I], read where it lies."""
    if tiles.size == 1:
        sum_product(scatter, span, tiles.read(everything, span), product)
        return
    partial = product(tiles.view(everything, span).flatten(1, -2), None)
    scatter.put(span, partial.view(-1, *everything.shape[1:-1], partial.shape[-1]))


class _Column(torch.autograd.Function):
    """[L, B, I] of every rank -> [S, B, O]: gather, multiply; backward: multiply, sum and scatter."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, weight: FrozenWeight, bias_O: torch.Tensor | None, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.weight, ctx.group, ctx.shape = weight, group, own.shape
        tiles = _product_tiles(group, own.shape, weight)
        out = own.new_empty((own.shape[0] * tiles.size, *own.shape[1:-1], weight.shape[0]))
        gathered = tiles.gather(own)
        held = weight.at_hand(own.dtype)
        for span in tiles.spans:
            product_into(tiles, span, out, next(gathered), held.product)
        return out if bias_O is None else out.add_(bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        tiles = _product_tiles(ctx.group, ctx.shape, ctx.weight)
        grad_own = grad.new_empty(ctx.shape)
        scatter = tiles.scatter(grad_own)
        held = ctx.weight.at_hand(grad.dtype)
        for span in tiles.spans:
            sum_product_of(scatter, tiles, span, grad, held.grad_input)
        scatter.finish()
        return grad_own, None, None, None


class _Row(torch.autograd.Function):
    """[S, B, I] -> [L, B, O] of every rank: multiply, sum and scatter; backward: gather, multiply.

    With `skip` the values are never computed.
    """

    @staticmethod
    def forward(
        ctx: Any, input_SBI: torch.Tensor, weight: FrozenWeight, group: dist.ProcessGroup, skip: bool
    ) -> torch.Tensor:
        ctx.weight, ctx.group = weight, group
        tokens = input_SBI.shape[0] // dist.get_world_size(group)
        shape = (tokens, *input_SBI.shape[1:-1], weight.shape[0])
        if skip:
            return placeholder(input_SBI, shape)
        own = input_SBI.new_empty(shape)
        tiles = _product_tiles(group, shape, weight)
        scatter = tiles.scatter(own)
        held = weight.at_hand(input_SBI.dtype)
        for span in tiles.spans:
            sum_product_of(scatter, tiles, span, input_SBI, held.product)
        scatter.finish()
        return own

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        tiles = _product_tiles(ctx.group, grad.shape, ctx.weight)
        if tiles.size == 1:
            return ctx.weight.grad_input(grad), None, None, None
        grad_input = grad.new_empty((grad.shape[0] * tiles.size, *grad.shape[1:-1], ctx.weight.shape[1]))
        gathered = tiles.gather(grad)
        held = ctx.weight.at_hand(grad.dtype)
        for span in tiles.spans:
            product_into(tiles, span, grad_input, next(gathered), held.grad_input)
        return grad_input, None, None, None


class TiledColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear on sequence-parallel tokens (qkv, gate and up), tiled if its weight is frozen."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[L, B, I] -> ([S, B, O], bias to be added later or None)."""
        # Biases are frozen with the weight, as in megatron's own linear with a frozen weight.
        weight = frozen_weight(self)
        if args or kwargs or weight is None:
            return super().forward(input_, *args, **kwargs)
        assert self.sequence_parallel or self.tp_group.size() == 1, (
            "megatron_config.transformer_config sets it with tp > 1"
        )
        bias, later = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return _Column.apply(input_, weight, bias, self.tp_group), later


class TiledRowParallelLinear(RowParallelLinear):
    """Row-parallel linear to sequence-parallel tokens (o_proj), tiled if its weight is frozen.

    Alone as well: megatron would return a view of the product, and an adapter's update could not be made in place.
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([L, B, O], bias to be added later or None)."""
        weight = self.tileable()
        if weight is None:
            return super().forward(input_)
        out = _Row.apply(input_, weight, self.tp_group, False)
        # Frozen as the weight is, and whole on every rank: added to the rank's own tokens once they are summed.
        return out if self.bias is None else out.add_(self.bias), None

    def tileable(self) -> FrozenWeight | None:
        """The weight if it is frozen and nothing is wanted but its product and a bias added at once."""
        later = self.bias is not None and self.skip_bias_add
        return frozen_weight(self) if self.input_is_parallel and not later else None


class LastRowParallelLinear(TiledRowParallelLinear):
    """Row-parallel linear whose output leaves the layer (down_proj): not computed in a recomputation if frozen."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([L, B, O], bias to be added later or None); values are arbitrary while recomputing."""
        weight = self.tileable() if recomputing() else None
        if weight is not None:
            return _Row.apply(input_, weight, self.tp_group, True), None
        return super().forward(input_)
