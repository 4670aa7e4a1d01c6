"""Tensors that wait for their backward in pinned host memory, copied there and back beside the computation.

The last PARKED ones stay on the GPU as well until their copies have ended, so that memory is bounded however far ahead
of the GPU its kernels are launched: before another one is parked the computing stream waits for the oldest copy. In the
backward pass, whose order is the forward's reversed, taking one starts to bring the one that was parked before it.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from parallel.axes.pinned import pin, whole_pages
from parallel.errors import LongspanError
from pipeline.planning.activations import PARKED


class Parked:
    """One tensor; `Parking.take` gives it back, once."""

    def __init__(self, tensor: torch.Tensor, buffer: torch.Tensor, before: Parked | None) -> None:
        self.shape, self.buffer = tensor.shape, buffer
        self.host = buffer[: tensor.numel()]
        self.gpu: torch.Tensor | None = tensor
        self.event: Any = None
        """Of its last copy."""
        self.before = None if before is None else weakref.ref(before)
        self.taken = False


class Parking:
    """Host memory, and a stream, of one device. Buffers are kept for the next step.

    Args:
        device: of the tensors; on a CPU they are copied, and nothing runs beside anything.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: list[Parked] = []
        self._last: weakref.ref[Parked] | None = None
        self._free: dict[torch.dtype, list[torch.Tensor]] = {}
        self._least = 0
        self.bytes = 0
        """Of host memory."""

    def expect(self, nbytes: int) -> None:
        """Buffers made from now on hold as much at least: a stream's last chunk, which parks first, may be short."""
        self._least = nbytes

    def park(self, tensor: torch.Tensor) -> Parked:
        """Start to copy a contiguous tensor away; its memory is freed when that has ended and nobody else has it.

        Raises:
            LongspanError: host memory cannot be pinned.
        """
        while len(self._leaving) >= PARKED:
            self._let_go(self._leaving.pop(0))
        before = None if self._last is None else self._last()
        parked = Parked(tensor.detach(), self._buffer(tensor), before)
        self._copy(parked, parked.host, tensor.view(-1))
        self._leaving.append(parked)
        self._last = weakref.ref(parked)
        return parked

    def take(self, parked: Parked) -> torch.Tensor:
        """The tensor, safe to use and to overwrite on the current stream.

        Raises:
            RuntimeError: it was taken before: a second backward through the same forward.
        """
        if parked.taken:
            raise RuntimeError("gate and up in host memory are given back once: a second backward needs them kept")
        self._leaving = [one for one in self._leaving if one is not parked]
        if parked.gpu is None:
            self._bring(parked)
        tensor, parked.gpu, parked.taken = parked.gpu, None, True
        assert tensor is not None
        self._wait(parked)
        # Copies of one stream follow each other: whoever gets this buffer next writes to it after they were made.
        self._free.setdefault(parked.buffer.dtype, []).append(parked.buffer)
        self._last = parked.before
        before = None if parked.before is None else parked.before()
        if before is not None and not before.taken and before.gpu is None:
            self._bring(before)
        return tensor

    def _bring(self, parked: Parked) -> None:
        parked.gpu = torch.empty(parked.shape, dtype=parked.host.dtype, device=self._device_of(parked))
        self._copy(parked, parked.gpu.view(-1), parked.host)

    def _device_of(self, parked: Parked) -> torch.device:
        return torch.device("cpu") if self._stream is None else self._stream.device

    def _copy(self, parked: Parked, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        # The source was just made, or the target's memory was used until now.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            parked.event = self._stream.record_event()

    def _wait(self, parked: Parked) -> None:
        if parked.event is not None:
            torch.cuda.current_stream().wait_event(parked.event)
            parked.event = None

    def _let_go(self, parked: Parked) -> None:
        self._wait(parked)
        parked.gpu = None

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        free = self._free.get(like.dtype, [])
        fitting = [place for place, buffer in enumerate(free) if buffer.numel() >= like.numel()]
        if fitting:
            return free.pop(min(fitting, key=lambda place: free[place].numel()))
        size = max(like.nbytes, self._least // like.itemsize * like.itemsize)
        buffer = whole_pages(size)[:size].view(like.dtype)
        self.bytes += buffer.nbytes
        if self._stream is not None and (error := pin(buffer)):
            raise LongspanError(
                f"train.gate_up: host: {buffer.nbytes / 2**30:.1f} GiB of host memory cannot be pinned after "
                f"{(self.bytes - buffer.nbytes) / 2**30:.1f} GiB (CUDA error {error}); raise `ulimit -l`, free host "
                "memory, or set train.gate_up: gpu."
            )
        return buffer


@functools.cache
def parking_of(device: torch.device) -> Parking:
    """The one of a device; its pinned buffers live as long as the process."""
    return Parking(device)
