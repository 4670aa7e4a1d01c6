"""Memory of this machine's GPUs, asked of NVIDIA's management library: no torch, which takes seconds to import."""

from __future__ import annotations

import ctypes
import functools


class _Memory(ctypes.Structure):
    """nvmlMemory_v2_t."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


VERSION = ctypes.sizeof(_Memory) | 2 << 24
"""nvmlMemory_v2: NVML's way to say which structure it is given."""


@functools.cache
def smallest_gpu() -> int | None:
    """Bytes a program can have of the GPU that has least, those that CUDA_VISIBLE_DEVICES hides included.

    None where there is no NVIDIA GPU or its driver does not say. What a MIG slice has is not looked at.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return _smallest(library)
    except (OSError, AttributeError):
        return None


def _smallest(nvml: ctypes.CDLL) -> int | None:
    if nvml.nvmlInit_v2():
        return None
    try:
        count, sizes = ctypes.c_uint(), []
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        for index in range(count.value):
            handle, memory = ctypes.c_void_p(), _Memory(version=VERSION)
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0 and (
                nvml.nvmlDeviceGetMemoryInfo_v2(handle, ctypes.byref(memory)) == 0
            ):
                sizes.append(memory.total - memory.reserved)
        return min(sizes, default=None)
    finally:
        nvml.nvmlShutdown()
