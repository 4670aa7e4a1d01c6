"""How a streamed sequence is cut into chunks and shards, by arithmetic; no torch (docs/STREAMING.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import lcm

from parallel.axes.halo_plan import ALIGN, plan_halos
from parallel.world.grid import GridPlan
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout, head_plan
from pipeline.planning.context_shards import halo_needs
from pipeline.planning.tensors import PROJECTIONS, projection_shape

TOGETHER = 1 << 15
"""Tokens of a forward of retrieval or RULER at most, unless one window is longer: short windows go through together."""

ENDS = 4
"""Chunks whose boundaries may differ from those in the midst: where groups begin before the sequence, and its end."""


@dataclass(frozen=True)
class StreamPlan:
    """A sequence's chunks, and their shards over context-parallel ranks.

    Every chunk has `chunk` tokens but the last, which is short, and padded to equal shards.
    """

    chunk: int
    """Tokens of a chunk, over all ranks; a multiple of tp x cp."""
    starts: tuple[int, ...]
    """First token of every chunk."""
    shards: tuple[int, ...]
    """Tokens of one rank's shard of every chunk."""
    cp: int

    @classmethod
    def of(cls, sequence: int, chunk: int, grid: GridPlan) -> StreamPlan:
        """The plan for sequences of `sequence` tokens.

        Raises:
            ValueError: `chunk` does not divide into equal shards.
        """
        if chunk % (grid.tp * grid.cp):
            raise ValueError(f"chunks of {chunk} tokens over tp {grid.tp} x cp {grid.cp}")
        starts = tuple(range(0, sequence, chunk))
        shards = (grid.shard_tokens(chunk),) * (len(starts) - 1)
        return cls(chunk, starts, (*shards, grid.shard_tokens(sequence - starts[-1])), grid.cp)

    def without(self, chunks: int) -> StreamPlan:
        """The same with so many chunks less, none of them the last."""
        left = len(self.starts) - chunks
        return StreamPlan(self.chunk, self.starts[:left], (*self.shards[: left - 1], self.shards[-1]), self.cp)

    @property
    def padded(self) -> int:
        """Tokens of the sequence with the last chunk's padding."""
        return self.starts[-1] + self.cp * self.shards[-1]

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges of all shards, numbered through the chunks: shard c * cp + r is rank r's part of chunk c."""
        inner = (
            start + rank * tokens
            for start, tokens in zip(self.starts, self.shards, strict=True)
            for rank in range(self.cp)
        )
        return (*inner, self.padded)


@dataclass(frozen=True)
class HaloBytes:
    """What the halos of one micro-batch take on the busiest rank, in bytes: all layers together, and one layer's."""

    parked: int
    """Host memory."""
    carried: int
    """The device: gradients that wait for the backward of the chunk they belong to."""
    fetched: int
    """One layer's on its way to the device, for the chunk that needs most."""


def halo_bytes(
    stream: StreamPlan, arch: LlamaArch, spec: AttentionSpec, grid: GridPlan, rows: int, width: int
) -> HaloBytes:
    """Counted from the plan of the halos itself; packed documents need less.

    Args:
        stream: a sequence's cut.
        spec: kind s2.
        rows: sequences a micro-batch.
        width: bytes of an element.
    """
    one = _layers_halos(stream, (arch.heads, arch.kv_heads), spec, grid.tp, rows, arch.head_dim * width)
    return HaloBytes(arch.layers * one.parked, arch.layers * one.carried, one.fetched)


@cache
def _layers_halos(
    stream: StreamPlan, heads_of: tuple[int, int], spec: AttentionSpec, tensor: int, rows: int, vector: int
) -> HaloBytes:
    """`halo_bytes` of one layer: the same for every layout that cuts sequences and heads alike.

    Args:
        heads_of: query and key-value heads of the model.
        tensor: tensor-parallel ranks.
        vector: bytes of a head's key or value.
    """
    if rows > 1 and vector % ALIGN == 0:
        one = _layers_halos(stream, heads_of, spec, tensor, 1, vector)
        return HaloBytes(rows * one.parked, rows * one.carried, rows * one.fetched)
    # After so many chunks their boundaries lie against the groups as before: a long sequence repeats a short one.
    period = lcm(stream.chunk, spec.group) // stream.chunk
    repeated = max(0, len(stream.starts) - 2 * period - ENDS) // period
    short, local, found = stream.without(repeated * period), heads_of[0] // tensor, HaloBytes(0, 0, 0)
    for heads in {head_plan(tp * local, local, *heads_of, spec.shifted_heads) for tp in range(tensor)}:
        for kept, waiting, wanted in _by_chunk(short, heads, spec, rows, vector):
            parked = sum(kept) + repeated * sum(kept[ENDS // 2 : ENDS // 2 + period])
            found = HaloBytes(max(found.parked, parked), max(found.carried, *waiting), max(found.fetched, *wanted))
    return found


def _by_chunk(
    stream: StreamPlan, heads: HeadPlan, spec: AttentionSpec, rows: int, vector: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each context rank, bytes of a layer: what it parks for a chunk, carries while one runs, and fetches for it."""
    cp, chunks = stream.cp, len(stream.starts)
    found = [([0] * chunks, [0] * chunks, [0] * chunks) for _ in range(cp)]
    layout, edges = SequenceLayout.dense(rows, stream.padded), stream.edges
    # What a shard needs of its own chunk is neither parked nor carried.
    needs = (
        [replace(one, stop=edges[shard - shard % cp]) for one in own if one.start < edges[shard - shard % cp]]
        for shard, own in enumerate(halo_needs(layout, spec, heads, edges))
    )
    for message in plan_halos(tuple(needs), edges).messages:
        kept, waiting, wanted = found[message.sender % cp]
        begin, end, size = message.sender // cp, message.receiver // cp, message.vectors * vector
        kept[end] += -(-size // ALIGN) * ALIGN
        wanted[end] += size
        # From the receiver's backward to the sender's.
        for chunk in range(begin + 1, end + 1):
            waiting[chunk] += size
    return found


def cut_for_greedy(prompt: int, tokens: int, at_once: int | None, grid: GridPlan) -> StreamPlan:
    """Chunks of a window, the last of which begins shortly before its shortest prompt ends.

    Where the window has no room for that (what is written is longer than the prompt), it is one chunk.

    Args:
        prompt: tokens of the shortest prompt, at least 1.
        tokens: S.
        at_once: tokens of a chunk at most, if what is written fits into one; None: any number.
    """
    unit, fixed = grid.tp * grid.cp, prompt - 1
    chunks = 1 if at_once is None else max(1, -(-fixed // at_once))
    while chunks:
        chunk = fixed // chunks // unit * unit
        if chunk and tokens - chunks * chunk <= chunk:
            return StreamPlan.of(tokens, chunk, grid)
        chunks -= 1
    return StreamPlan.of(tokens, grid.cp * grid.shard_tokens(tokens), grid)


def rows_together(windows: int, length: int) -> int:
    """Windows of retrieval or RULER that go through at once.

    Args:
        windows: there are.
        length: tokens of each.
    """
    return max(1, min(windows, TOGETHER // length))


def cache_bytes(arch: LlamaArch, grid: GridPlan, tokens: int, rows: int, width: int) -> int:
    """Host memory of a rank for the keys and values of `tokens` tokens of `rows` windows, bytes.

    Args:
        width: bytes of an element.
    """
    layers = -(-arch.layers // grid.pp)
    return 2 * layers * (tokens // grid.cp) * rows * (arch.kv_heads // grid.tp) * arch.head_dim * width


@dataclass(frozen=True)
class PrefillCost:
    """What one window takes in full attention, chunk by chunk."""

    tokens: int
    host: int
    """Bytes of host memory of a rank: keys and values of all chunks but the last."""
    attention: float
    """Floating-point operations of all ranks of a replica: 4 D for every query head, query and key that it sees."""
    products: float
    """Of the layers' matrices: 2 a parameter and token."""

    @property
    def sentence(self) -> str:
        """For the user, before it is spent."""
        total = self.attention + self.products
        return (
            f"a window of {self.tokens:,} tokens takes {total:.1e} floating-point operations, "
            f"{self.attention / total:.0%} of them full attention, and {self.host / 2**30:.1f} GiB of host memory a "
            "rank for keys and values"
        )


def prefill_cost(arch: LlamaArch, grid: GridPlan, tokens: int, chunk: int, width: int) -> PrefillCost:
    """Of a window of `tokens` at `chunk` tokens at once.

    Args:
        width: bytes of an element.
    """
    host = cache_bytes(arch, grid, StreamPlan.of(tokens, chunk, grid).starts[-1], 1, width)
    matrices = sum(rows * columns for rows, columns in (projection_shape(name, arch) for name in PROJECTIONS))
    pairs = tokens * (tokens + 1) // 2
    attention = 4.0 * arch.head_dim * arch.heads * arch.layers * pairs
    return PrefillCost(tokens, host, attention, 2.0 * matrices * arch.layers * tokens)


def chunk_sizes(sequence: int, group: int, grid: GridPlan) -> tuple[int, ...]:
    """Chunks to choose from, rising: a group times powers of two, so that a boundary's halo is half a group.

    The last one is a sequence or more.
    """
    unit = grid.tp * grid.cp
    sizes = [-(-group // unit) * unit]
    while sizes[-1] < sequence:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)
