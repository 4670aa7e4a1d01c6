"""Keys and values of a sequence that passes through in chunks under full attention, without gradients, in host memory.

Each context-parallel rank keeps those of its own tokens. For a later chunk it brings them back to the device, one layer
at a time, and the ranks gather the whole past of that layer. So the device holds one layer's past, never all.

Shape suffixes: L tokens of a shard, B rows, K KV heads, D head dim, N tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from parallel.axes.context import Flight
from parallel.axes.halo_plan import Region
from parallel.axes.pinned import pin, unpin, whole_pages
from parallel.errors import LongspanError
from parallel.world.context_shard import ContextShard
from parallel.world.lone_rank import to_receive


class KeyValueCache:
    """What one rank keeps, by layer; page-locked where the device is a GPU."""

    def __init__(self) -> None:
        self._layers: dict[int, torch.Tensor] = {}
        self._pinned: dict[int, torch.Tensor] = {}

    def keep(self, layer: int, start: int, capacity: int, k_LBKD: torch.Tensor, v_LBKD: torch.Tensor) -> None:
        """Keep a shard's keys and values as this rank's tokens [start, start + L) of `capacity`.

        Raises:
            LongspanError: host memory cannot be page-locked.
        """
        tokens, *rest = k_LBKD.shape
        kept = self._layers.get(layer)
        if kept is None or kept.shape[1:] != (capacity, *rest) or kept.dtype != k_LBKD.dtype:
            self._layers[layer] = kept = self._allocate(layer, (2, capacity, *rest), k_LBKD)
        for place, values in zip(kept, (k_LBKD, v_LBKD), strict=True):
            place[start : start + tokens].copy_(values, non_blocking=True)

    def past(self, layer: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
        """This rank's first `tokens` keys and values on the device of `like`, [2, tokens, B, K, D]."""
        found = torch.empty((2, tokens, *like.shape[1:]), dtype=like.dtype, device=like.device)
        if tokens:
            for target, place in zip(found, self._layers[layer], strict=True):
                target.copy_(place[:tokens], non_blocking=True)
        return found

    def _allocate(self, layer: int, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if not like.is_cuda:
            return torch.empty(shape, dtype=like.dtype)
        if layer in self._pinned:
            unpin(self._pinned.pop(layer))
        size = math.prod(shape) * like.dtype.itemsize
        memory = whole_pages(size)
        if error := pin(memory):
            raise LongspanError(
                f"eval.prefill: {size / 2**30:.1f} GiB of host memory for a layer's keys and values "
                f"cannot be pinned (CUDA error {error}); evaluate at a shorter length, or free host memory."
            )
        self._pinned[layer] = memory
        return memory[:size].view(like.dtype).view(shape)

    def __del__(self) -> None:
        # Memory freed while page-locked could not be page-locked by whom it is given to next.
        if self._pinned:
            self.close()

    def close(self) -> None:
        """Give the memory back."""
        for memory in self._pinned.values():
            unpin(memory)
        self._pinned.clear()
        self._layers.clear()


class CacheExchange:
    """One layer's keys and values of all tokens up to a chunk's end; an `Exchange` without gradients.

    Args:
        shard: this rank's part of the chunk.
        reads: what this rank's calls read, tokens up to the chunk's end.
        layer: its number in the model.
        cache: this rank's.
        chunk: tokens of every chunk but the last, over all ranks.
        capacity: tokens of all chunks but the last.
    """

    def __init__(
        self,
        shard: ContextShard,
        reads: Sequence[Region],
        layer: int,
        cache: KeyValueCache,
        chunk: int,
        capacity: int,
    ) -> None:
        self.shard, self.reads = shard, tuple(reads)
        self._layer, self._cache, self._chunk, self._capacity = layer, cache, chunk, capacity

    def send(self, k_LBKD: torch.Tensor, v_LBKD: torch.Tensor) -> Flight:
        """As `Exchange.send`; done when it returns."""
        size, begin = self.shard.size, self.shard.offset
        own = self._cache.past(self._layer, begin // size, k_LBKD)
        here = torch.stack((k_LBKD, v_LBKD))
        if begin < self._capacity:
            self._cache.keep(self._layer, begin // size, self._capacity // size, k_LBKD, v_LBKD)
        if size == 1:
            return Flight([], [torch.cat((own, here), dim=1) if begin else here], [])
        # Tokens lie by chunk, then by rank, then in order.
        past = self._gather(own).unflatten(2, (-1, self._chunk // size)) if begin else None
        parts = [] if past is None else [past.permute(1, 2, 0, *range(3, past.ndim)).flatten(1, 3)]
        return Flight([], [torch.cat([*parts, self._gather(here).transpose(0, 1).flatten(1, 2)], dim=1)], [])

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """[2, ...] of every rank, [ranks, 2, ...]."""
        whole = to_receive(own, (self.shard.size * 2, *own.shape[1:]), self.shard.group)
        dist.all_gather_into_tensor(whole, own.contiguous(), group=self.shard.group)
        return whole.unflatten(0, (self.shard.size, 2))

    def receive(self, flight: Flight) -> list[torch.Tensor]:
        """As `Exchange.receive`; views."""
        (whole,) = flight.wait()
        return [
            x[read.start : read.stop, read.row_start : read.row_stop, read.head_start : read.head_stop]
            for read in self.reads
            for x in whole
        ]

    def send_back(self, grads: Sequence[torch.Tensor], like: torch.Tensor) -> Flight:
        """There is no backward."""
        raise NotImplementedError("a cache of keys and values has no gradients")

    def receive_back(self, flight: Flight, dk_LBKD: torch.Tensor, dv_LBKD: torch.Tensor) -> None:
        """There is no backward."""
        raise NotImplementedError("a cache of keys and values has no gradients")
