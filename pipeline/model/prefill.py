"""Full attention over a sequence of any length, forward only: chunk after chunk, with the past's keys and values.

The memory of a forward pass is then that of a chunk and of one layer's past; all layers' keys and values are in host
memory (`parallel.axes.kv_cache`): 128 KiB a token for Llama-3-8B in bf16. The work is that of one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.axes.context import Exchange
from parallel.axes.halo_plan import Region
from parallel.axes.kv_cache import CacheExchange, KeyValueCache
from parallel.world.context_shard import ContextShard
from pipeline.planning.attention_layout import HeadPlan
from pipeline.planning.stream import StreamPlan


@dataclass(frozen=True)
class CachedPast:
    """Where a chunk has its past from (`attention.layer.Past`)."""

    cut: StreamPlan
    shard: ContextShard
    cache: KeyValueCache

    def exchange(self, layer: int, heads: HeadPlan, reads: Sequence[Region]) -> Exchange:
        """As `Past.exchange`."""
        return CacheExchange(self.shard, reads, layer, self.cache, self.cut.chunk, self.cut.starts[-1])

    def leaving(self, layer: int) -> int | None:
        """As `Past.leaving`: any token may be scored."""
        return None


def prefill(cut: StreamPlan, shard: ContextShard, cache: KeyValueCache) -> Iterator[CachedPast]:
    """The chunks of a sequence in order, each with its past.

    Args:
        cut: of the sequence.
        shard: this rank's place; its tokens and offset are set for every chunk.
        cache: this rank's; what it holds of another sequence is overwritten.
    """
    for start, tokens in zip(cut.starts, cut.shards, strict=True):
        yield CachedPast(cut, ContextShard(shard.group, shard.rank, shard.size, tokens, start, shard.meter), cache)
