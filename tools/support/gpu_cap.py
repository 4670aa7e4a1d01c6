"""A GPU made to look smaller than it is."""

from __future__ import annotations

import torch

from pipeline.planning.memory import GIB


def cap_memory(gib: float | None, local_rank: int) -> None:
    """Let PyTorch have no more of a GPU than this; None, or no GPU: nothing changes."""
    if gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(local_rank).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total), local_rank)
