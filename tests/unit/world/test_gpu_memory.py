"""The smallest GPU is read from what NVIDIA's management library says, and none is no error."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.world import gpu_memory


class Library:
    """NVML in the shape of its header: results through pointers, 0 for success, one call's failure planted."""

    def __init__(self, sizes: list[tuple[int, int]], fails: str = "") -> None:
        self.sizes, self.fails, self.closed = sizes, fails, False

    def _code(self, name: str) -> int:
        return 999 if name == self.fails else 0

    def nvmlInit_v2(self) -> int:
        return self._code("init")

    def nvmlShutdown(self) -> int:
        self.closed = True
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.sizes)
        return self._code("count")

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return self._code("handle")

    def nvmlDeviceGetMemoryInfo_v2(self, handle: Any, memory: Any) -> int:
        assert memory._obj.version == 40 | 2 << 24, "nvmlMemory_v2 as nvml.h has it: 40 bytes, version 2"
        memory._obj.total, memory._obj.reserved = self.sizes[handle.value - 1]
        return self._code("memory")


@pytest.mark.parametrize(
    ("sizes", "fails", "expected"),
    [
        ([(80, 2), (24, 1)], "", 23),
        ([(80, 2)], "", 78),
        ([], "", None),
        ([(80, 2)], "init", None),
        ([(80, 2)], "count", None),
        ([(80, 2)], "handle", None),
        ([(80, 2)], "memory", None),
    ],
)
def test_the_smallest_gpu(sizes: list[tuple[int, int]], fails: str, expected: int | None) -> None:
    library = Library(sizes, fails)
    assert gpu_memory._smallest(library) == expected  # type: ignore[arg-type]
    assert library.closed == (fails != "init")


def test_no_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    gpu_memory.smallest_gpu.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", absent)
    assert gpu_memory.smallest_gpu() is None
    gpu_memory.smallest_gpu.cache_clear()
