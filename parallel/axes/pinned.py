"""Host memory page-locked as it lies, to the byte: torch's own pinned allocator rounds blocks up to powers of two."""

from __future__ import annotations

import contextlib

import torch

PAGE = 4096
"""Bytes that are page-locked together."""


def whole_pages(size: int) -> torch.Tensor:
    """Host memory of at least `size` bytes, uint8, that shares no page with anything else.

    CUDA refuses to page-lock a page that is locked already, as a neighbour's may be.
    """
    size = -(-size // PAGE) * PAGE
    room = torch.empty(size + PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE
    return room[start : start + size]


def pin(memory: torch.Tensor) -> int:
    """Page-lock a contiguous CPU tensor; the CUDA error code, 0 when it worked. `unpin` it before it is freed."""
    size = memory.numel() * memory.element_size()
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
    if code:
        # CUDA remembers a refusal as its last error, which torch would raise, and clear, at the next launch of any
        # kernel: one is launched here, so that the refusal stays what its caller makes of it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda").add_(1)
    return code


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`, once copies under way have ended."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
