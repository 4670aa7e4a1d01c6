"""Host memory page-locked as it lies, to the byte: torch's own pinned allocator rounds blocks up to powers of two."""

from __future__ import annotations

import torch


def pin(memory: torch.Tensor) -> int:
    """Page-lock a contiguous CPU tensor; the CUDA error code, 0 when it worked. `unpin` it before it is freed."""
    size = memory.numel() * memory.element_size()
    return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`, once copies under way have ended."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
