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

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from parallel.axes.tensor import Span as Tokens
from parallel.axes.tensor import TileScatter, TokenTiles
from pipeline.planning.tile_size import tile_tokens


def tiles_of(group: dist.ProcessGroup, shape: Sequence[int], width: int) -> TokenTiles:
    """How own tokens are cut.

    Args:
        group: tensor-parallel ranks.
        shape: [L, B, any] of a rank's own tokens; a tile has those of all B sequences.
        width: columns of all that exists of a tile at once.
    """
    return TokenTiles(group, shape[0], tile_tokens(width, dist.get_world_size(group)) // prod(shape[1:-1]))


def _product_tiles(group: dist.ProcessGroup, shape: Sequence[int], weight_OI: torch.Tensor) -> TokenTiles:
    """For one product: the next tile's input or the last one's sums exist beside it. Alone, nothing does: one tile."""
    if dist.get_world_size(group) == 1:
        return TokenTiles(group, shape[0], shape[0])
    return tiles_of(group, shape, 2 * max(weight_OI.shape))


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as only activation checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


def product(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[l, B, I] times [I, O], into `out` if given; flattened, since matmul does not fold a batch of one."""
    flat = rows.reshape(-1, rows.shape[-1])
    if out is not None:
        torch.mm(flat, matrix, out=out.view(-1, matrix.shape[1]))
        return out
    return torch.mm(flat, matrix).view(*rows.shape[:-1], matrix.shape[1])


def product_into(
    tiles: TokenTiles, span: Tokens, everything: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor
) -> None:
    """A gathered tile [T l, B, I] times [I, O], written where it belongs in all ranks' tokens [S, B, O]."""
    target = tiles.view(everything, span).flatten(1, -2)
    torch.bmm(rows.view(*target.shape[:2], -1), matrix.expand(tiles.size, *matrix.shape), out=target)


def sum_product(scatter: TileScatter, span: Tokens, rows: torch.Tensor, matrix: torch.Tensor) -> None:
    """A gathered tile's product, summed over the ranks."""
    scatter.put(span, product(rows, matrix, scatter.target(span)))


def sum_product_of(
    scatter: TileScatter, tiles: TokenTiles, span: Tokens, everything: torch.Tensor, matrix: torch.Tensor
) -> None:
    """The same of a tile of all ranks' tokens [S, B, I], read where it lies."""
    if tiles.size == 1:
        sum_product(scatter, span, tiles.read(everything, span), matrix)
        return
    rows = tiles.view(everything, span).flatten(1, -2)
    partial = torch.bmm(rows, matrix.expand(tiles.size, *matrix.shape))
    scatter.put(span, partial.view(-1, *everything.shape[1:-1], matrix.shape[1]))


def placeholder(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of which only the shape matters: one element, of any value, seen everywhere."""
    return like.new_empty(1).expand(shape)


class _Column(torch.autograd.Function):
    """[L, B, I] of every rank -> [S, B, O]: gather, multiply; backward: multiply, sum and scatter."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.group, ctx.shape = group, own.shape
        tiles = _product_tiles(group, own.shape, weight_OI)
        out = own.new_empty((own.shape[0] * tiles.size, *own.shape[1:-1], weight_OI.shape[0]))
        gathered = tiles.gather(own)
        for span in tiles.spans:
            product_into(tiles, span, out, next(gathered), weight_OI.t())
        return out if bias_O is None else out.add_(bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        tiles = _product_tiles(ctx.group, ctx.shape, weight)
        grad_own = grad.new_empty(ctx.shape)
        scatter = tiles.scatter(grad_own)
        for span in tiles.spans:
            sum_product_of(scatter, tiles, span, grad, weight)
        scatter.finish()
        return grad_own, None, None, None


class _Row(torch.autograd.Function):
    """[S, B, I] -> [L, B, O] of every rank: multiply, sum and scatter; backward: gather, multiply.

    With `skip` the values are never computed.
    """

    @staticmethod
    def forward(
        ctx: Any, input_SBI: torch.Tensor, weight_OI: torch.Tensor, group: dist.ProcessGroup, skip: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.group = group
        tokens = input_SBI.shape[0] // dist.get_world_size(group)
        shape = (tokens, *input_SBI.shape[1:-1], weight_OI.shape[0])
        if skip:
            return placeholder(input_SBI, shape)
        own = input_SBI.new_empty(shape)
        tiles = _product_tiles(group, shape, weight_OI)
        scatter = tiles.scatter(own)
        for span in tiles.spans:
            sum_product_of(scatter, tiles, span, input_SBI, weight_OI.t())
        scatter.finish()
        return own

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        tiles = _product_tiles(ctx.group, grad.shape, weight)
        if tiles.size == 1:
            return product(grad, weight), None, None, None
        grad_input = grad.new_empty((grad.shape[0] * tiles.size, *grad.shape[1:-1], weight.shape[1]))
        gathered = tiles.gather(grad)
        for span in tiles.spans:
            product_into(tiles, span, grad_input, next(gathered), weight)
        return grad_input, None, None, None


class TiledColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear on sequence-parallel tokens (qkv, gate and up), tiled if its weight is frozen."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[L, B, I] -> ([S, B, O], bias to be added later or None)."""
        # Biases are frozen with the weight, as in megatron's own linear with a frozen weight.
        if self.tp_group.size() == 1 or args or kwargs or self.weight.requires_grad:
            return super().forward(input_, *args, **kwargs)
        assert self.sequence_parallel, "spec.transformer_config sets it with tp > 1"
        bias, later = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return _Column.apply(input_, self.weight, bias, self.tp_group), later


class TiledRowParallelLinear(RowParallelLinear):
    """Row-parallel linear to sequence-parallel tokens (o_proj), tiled if its weight is frozen.

    Alone as well: megatron would return a view of the product, and an adapter's update could not be made in place.
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([L, B, O], bias to be added later or None)."""
        if not self.tileable():
            return super().forward(input_)
        return _Row.apply(input_, self.weight, self.tp_group, False), None

    def tileable(self) -> bool:
        """Whether the weight is frozen and nothing but its product is wanted."""
        return not self.weight.requires_grad and self.bias is None and self.input_is_parallel


class LastRowParallelLinear(TiledRowParallelLinear):
    """Row-parallel linear whose output leaves the layer (down_proj): not computed in a recomputation if frozen."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([L, B, O], bias to be added later or None); values are arbitrary while recomputing."""
        if recomputing() and self.tileable():
            return _Row.apply(input_, self.weight, self.tp_group, True), None
        return super().forward(input_)
