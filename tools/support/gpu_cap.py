"""A GPU made to look smaller than it is."""

from __future__ import annotations

import torch

from parallel.world.gpu_memory import smallest_gpu
from pipeline.planning.memory import GIB


def cap_memory(gib: float | None, local_rank: int) -> None:
    """Let PyTorch have no more of a GPU than this; None, or no GPU: nothing changes."""
    if gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(local_rank).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total), local_rank)


def room_within(gib: float | None) -> int | None:
    """Bytes a plan may count on: of the smallest GPU, and no more than the cap. None: neither is known."""
    known = [size for size in (smallest_gpu(), None if gib is None else int(gib * GIB)) if size is not None]
    return min(known, default=None)
