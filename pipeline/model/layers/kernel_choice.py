"""Where the Triton kernels can serve; elsewhere torch's own operations do."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch


@functools.cache
def load_kernels(device: torch.device) -> ModuleType | None:
    """The module `triton_kernels`, if its kernels can be built and run on this device; else None, and a warning."""
    try:
        from pipeline.model.layers import triton_kernels

        triton_kernels.probe(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, its headers or a driver may lack
        warnings.warn(
            "SwiGLU, RoPE, LoRA's updates and norms' gradients run unfused, which is slower: Triton's kernels do not "
            f"work here ({error}). Most often a C compiler or Python's headers are missing.",
            stacklevel=2,
        )
        return None
    return triton_kernels


def kernels_for(first: torch.Tensor, *others: torch.Tensor) -> ModuleType | None:
    """The module `triton_kernels` where it can serve: `first` is of a dtype it knows and `others` are contiguous.

    And all are on the current GPU, where Triton launches whatever its tensors are on.
    """
    if first.device.type != "cuda" or first.dtype is torch.float64 or not all(x.is_contiguous() for x in others):
        return None
    return load_kernels(first.device) if first.device.index == torch.cuda.current_device() else None
