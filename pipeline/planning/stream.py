"""How a streamed sequence is cut into chunks and shards, by arithmetic; no torch (docs/STREAMING.md)."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.world.grid import GridPlan
from pipeline.config.run import RunConfig
from pipeline.planning.arch import LlamaArch


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
        lengths = [*([chunk] * (len(starts) - 1)), sequence - starts[-1]]
        return cls(chunk, starts, tuple(grid.shard_tokens(length) for length in lengths), grid.cp)

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


def plan_stream(config: RunConfig, arch: LlamaArch, grid: GridPlan) -> int | None:
    """Tokens of a chunk, or None where whole sequences are trained on at once."""
    stream = config.train.stream
    assert not isinstance(stream, str)
    return stream
