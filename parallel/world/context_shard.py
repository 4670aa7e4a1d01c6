"""A rank's place along the sequence, and what it really sent."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch.distributed as dist


@dataclass
class ByteMeter:
    """Bytes that the exchanges of one rank really moved, since it was made."""

    sent: int = 0
    """K and V, and queries and outputs that move, forward."""
    received: int = 0
    """Likewise."""
    sent_back: int = 0
    """Their gradients, backward."""
    received_back: int = 0
    """Likewise."""


@dataclass(frozen=True)
class ContextShard:
    """A rank's place along the sequence: of `size` shards of L tokens it holds number `rank`."""

    group: dist.ProcessGroup
    """The context-parallel group, ordered by shard."""
    rank: int
    """Within the group."""
    size: int
    tokens: int
    """L."""
    offset: int = 0
    """Where the first rank's shard begins: 0, or under streaming the first token of the chunk that is at work."""
    meter: ByteMeter = field(default_factory=ByteMeter, compare=False)

    @property
    def start(self) -> int:
        """First token of the shard."""
        return self.offset + self.rank * self.tokens

    @property
    def stop(self) -> int:
        """Last token of the shard plus one."""
        return self.start + self.tokens

    def last(self, tokens: int) -> ContextShard:
        """The last so many tokens of the only shard."""
        assert self.size == 1, "of several shards all would be cut"
        return replace(self, offset=self.stop - tokens, tokens=tokens)
