"""Sequence parallelism tile by tile: a few tokens of every tensor-parallel rank are gathered, used and scattered again.

Megatron's sequence parallelism gathers whole sequences before a matrix product and holds whole partial sums after one:
[S, H] each, on every rank, and the product waits. Here the next tile is gathered, and the last one's sums scattered,
while the present one is computed; memory is that of two tiles.

A tile is a range of each rank's own tokens. Gathered, it holds that range of rank 0, then of rank 1, and so on.

Shapes: T ranks, L tokens of a rank, l tokens of a tile, trailing axes any. Without tensor parallelism (T = 1) nothing
moves and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.world.lone_rank import all_gather, reduce_scatter

Span = tuple[int, int]
"""[start, stop) of a rank's own tokens."""
ROWS = 128
"""Rows that a GPU's matrix units take at once: what a product has beyond a multiple costs as much as so many more."""
Rows = Callable[[int, int], torch.Tensor]
"""(start, stop) -> a rank's own tokens [start, stop), contiguous [l, ...]."""


class TokenTiles:
    """How L tokens of each rank of `group` are cut.

    Args:
        group: tensor-parallel ranks; None: this one alone.
        tokens: L, the same on every rank.
        most: tokens of a gathered tile (T l) wanted; the tiles come out equal, but for a shorter last one. Tiles of
            many tokens get a multiple of ROWS, and up to a third more tiles are made if they are all alike then.
    """

    def __init__(self, group: dist.ProcessGroup | None, tokens: int, most: int) -> None:
        self.group, self.tokens = group, tokens
        self.size = 1 if group is None else dist.get_world_size(group)
        count = max(1, -(-tokens * self.size // max(1, most)))
        step = max(1, -(-tokens // count))
        # Products of all ranks' tokens are made of ROWS in each rank's, those of a whole tile in all together.
        rows = ROWS if step >= 4 * ROWS else ROWS // math.gcd(ROWS, self.size)
        if count > 1 and step >= 4 * rows:
            alike = (tokens // more for more in range(count, 4 * count // 3 + 1) if tokens % more == 0)
            step = next((step for step in alike if step % rows == 0), -(-step // rows) * rows)
        self.spans: Sequence[Span] = [(start, min(start + step, tokens)) for start in range(0, tokens, step)]

    def gather(self, *sources: torch.Tensor | Rows) -> Iterator[torch.Tensor]:
        """[L, ...] of every rank -> of each tile [T l, ...], of several sources in turn; the next one is under way.

        A source may make its tokens when they are needed. A tile's memory is free again when the caller lets go of it:
        a loop variable would keep it until the next but one has been posted.
        """
        sources = tuple(source.contiguous() if isinstance(source, torch.Tensor) else source for source in sources)
        wanted = [(source, span) for span in self.spans for source in sources]
        under_way = [self._post(*wanted[0])]
        for number in range(len(wanted)):
            if number + 1 < len(wanted):
                under_way.append(self._post(*wanted[number + 1]))
            # No name of ours holds the tile while the caller has it.
            yield _arrived(*under_way.pop(0))

    def _post(self, source: torch.Tensor | Rows, span: Span) -> tuple[torch.Tensor, Any]:
        piece = source[span[0] : span[1]] if isinstance(source, torch.Tensor) else source(*span)
        if self.size == 1:
            return piece, None
        return all_gather(piece, self.group)

    def view(self, everything: torch.Tensor, span: Span) -> torch.Tensor:
        """A tile's place in a contiguous tensor [T L, ...] of all ranks' tokens: a view [T, l, ...]."""
        return everything.unflatten(0, (self.size, self.tokens))[:, span[0] : span[1]]

    def read(self, everything: torch.Tensor, span: Span) -> torch.Tensor:
        """A tile's part [T l, ...] of a tensor [T L, ...] of all ranks' tokens: a view if T = 1, else a copy."""
        if self.size == 1:
            return everything[span[0] : span[1]]
        return self.view(everything, span).flatten(0, 1)

    def write(self, everything: torch.Tensor, span: Span, values: torch.Tensor) -> None:
        """Put a tile's values [T l, ...] where `read` finds them."""
        self.view(everything, span).copy_(values.unflatten(0, (self.size, span[1] - span[0])))

    def scatter(self, own: torch.Tensor) -> TileScatter:
        """What sums tiles over the ranks into `own` [L, ...]."""
        return TileScatter(self, own)


def _arrived(whole: torch.Tensor, work: Any) -> torch.Tensor:
    if work is not None:
        work.wait()
    return whole


class TileScatter:
    """Sums of tiles over the ranks, each rank keeping its own tokens; call `finish` before `own` is read.

    At most one sum is under way while the next tile is computed.
    """

    def __init__(self, tiles: TokenTiles, own: torch.Tensor) -> None:
        assert own.is_contiguous()
        self._tiles, self._own = tiles, own
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def target(self, span: Span) -> torch.Tensor | None:
        """Where a product may be written directly, [l, ...]: without tensor parallelism there is no sum."""
        return self._own[span[0] : span[1]] if self._tiles.size == 1 else None

    def put(self, span: Span, partial: torch.Tensor) -> None:
        """Start to sum a tile [T l, ...]; nothing to do where it was written to `target`."""
        if self._tiles.size == 1:
            return
        self.finish()
        own = self._own[span[0] : span[1]]
        # The tile is kept until it was read: NCCL reads it on a stream of its own.
        self._under_way = reduce_scatter(own, partial, self._tiles.group), partial

    def finish(self) -> None:
        """Make the current stream wait for what is under way."""
        if self._under_way is not None and self._under_way[0] is not None:
            self._under_way[0].wait()
        self._under_way = None
