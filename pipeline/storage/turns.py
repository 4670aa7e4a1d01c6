"""Memory that reads use by turns."""

from __future__ import annotations

import torch

from pipeline.storage.safetensors import TensorFact

ALIGNMENT = 64
"""Bytes; a tensor begins at a multiple."""
MOST = 1 << 30
"""Bytes kept for a turn."""


class Turns:
    """Gives tensors memory that earlier ones had: of what a read from the page cache takes, the larger part is the
    kernel's finding and zeroing of fresh pages.

    A tensor keeps its contents through its own turn and the next `kept` - 1. Memory grows to what a turn asked for;
    what goes beyond it, or beyond `MOST`, is fresh.

    Args:
        kept: turns whose tensors live at once.
    """

    def __init__(self, kept: int) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(kept)]
        self._now = self._used = self._asked = 0

    def begin(self) -> None:
        """Begin a turn."""
        self._now = (self._now + 1) % len(self._buffers)
        if len(self._buffers[self._now]) < (wanted := min(self._asked, MOST)):
            self._buffers[self._now] = torch.empty(wanted, dtype=torch.uint8)
        self._used = self._asked = 0

    def empty(self, fact: TensorFact) -> torch.Tensor:
        """A tensor of this turn, on the CPU, its contents undefined."""
        size = -(-fact.nbytes // ALIGNMENT) * ALIGNMENT
        self._asked += size
        buffer = self._buffers[self._now]
        if not fact.nbytes or self._used + size > len(buffer):
            return fact.empty()
        found = buffer[self._used : self._used + fact.nbytes].view(fact.dtype).view(fact.shape)
        self._used += size
        return found
