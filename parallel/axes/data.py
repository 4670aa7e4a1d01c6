"""Data parallelism over flat buffers: gradients summed in buckets while backward runs, optimizer slices put together.

Both classes see one flat space in which every parameter owns a span of elements, in model order. They know ranks,
elements and order; names, learning rates and dtypes of parameters belong to `pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.world.lone_rank import to_receive

Span = tuple[int, int]
"""[start, stop) of a parameter in the flat space, in elements."""


def plan_buckets(spans: Sequence[Span], bucket_elements: int) -> list[list[int]]:
    """Indices of the parameters of every bucket, in the order the buckets are reduced.

    Backward produces the last layers' gradients first, so buckets are filled from the end of the flat space. A bucket
    holds whole parameters, at most `bucket_elements` elements of them unless a single one is larger.

    Raises:
        ValueError: spans overlap or are out of order, or `bucket_elements` is not positive.
    """
    if bucket_elements < 1:
        raise ValueError(f"bucket_elements is {bucket_elements}, not positive")
    ends = [0, *(stop for _, stop in spans)]
    if any(start < before or stop < start for before, (start, stop) in zip(ends, spans, strict=False)):
        raise ValueError("spans must ascend without overlap")
    buckets: list[list[int]] = []
    for index in reversed(range(len(spans))):
        if buckets and spans[buckets[-1][0]][1] - spans[index][0] <= bucket_elements:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


class GradientReducer:
    """Sums a flat gradient buffer over a group, bucket by bucket, as early as backward allows.

    A step is: `reset`, backwards of all micro-batches but the last, `arm`, the last backward (whose post-accumulate
    hooks call `ready`), `finish`. Without `arm` everything is summed in `finish`, to the same bits.

    Buckets are started in one order on every rank, however hooks fire: NCCL pairs collectives by their order.

    Args:
        flat: fp32 gradients, 1-D.
        spans: of the parameters in `flat`, ascending.
        group: ranks whose buffers are summed.
        bucket_elements: see `plan_buckets`.

    Raises:
        ValueError: spans that do not fit `flat`, or see `plan_buckets`.
    """

    def __init__(
        self, flat: torch.Tensor, spans: Sequence[Span], group: dist.ProcessGroup, bucket_elements: int
    ) -> None:
        if flat.ndim != 1 or not spans or spans[-1][1] > flat.numel():
            raise ValueError("spans must lie within a 1-D buffer, and there must be one")
        self.group = group
        self.buckets = plan_buckets(spans, bucket_elements)
        self._bucket_of = {index: number for number, bucket in enumerate(self.buckets) for index in bucket}
        self._views = [flat[spans[bucket[-1]][0] : spans[bucket[0]][1]] for bucket in self.buckets]
        self._works: list[Any] = []
        self._finished = False
        self.norms: list[torch.Tensor] | None = None
        """fp32 scalars: L2 norms of the buckets started in this step, of this rank's own gradients; None: not wanted.
        They take one more reading of the buffer."""
        self.reset()

    @property
    def started(self) -> int:
        """Buckets whose sum has been started in this step: always the first so many."""
        return len(self._works)

    @property
    def finished(self) -> bool:
        """Whether the buffer holds sums over the group."""
        return self._finished

    def reset(self) -> None:
        """Begin a step: nothing is armed, ready or started.

        Raises:
            RuntimeError: sums were started and never awaited.
        """
        if self._works and not self._finished:
            raise RuntimeError("gradient sums are still under way: call finish() before the next step")
        self._works = []
        if self.norms is not None:
            self.norms.clear()
        self._armed: set[int] = set()
        self._ready: set[int] = set()
        self._missing = [len(bucket) for bucket in self.buckets]
        self._finished = False

    def arm(self, indices: Iterable[int] | None = None) -> None:
        """Say that the next gradient of these parameters (None: all) is their last of the step.

        Under an interleaved schedule the model chunks reach their last micro-batch at different times: arm each chunk's
        parameters when it does. A parameter left out is summed in `finish`.

        Raises:
            RuntimeError: the step's sums are finished, or a parameter is armed twice.
        """
        chosen = set(self._bucket_of if indices is None else indices)
        if self._finished:
            raise RuntimeError("gradients of this step are already summed: call reset() before arming again")
        if chosen & self._armed:
            raise RuntimeError(f"parameter {min(chosen & self._armed)} is armed twice in one step")
        if not chosen <= self._bucket_of.keys():
            raise RuntimeError(f"parameter {max(chosen - self._bucket_of.keys())} does not exist")
        self._armed |= chosen

    def ready(self, index: int) -> None:
        """Note that a gradient of parameter `index` is in the buffer; called from its post-accumulate hook.

        Raises:
            RuntimeError: its bucket's sum was started before, so this gradient is lost on the other ranks (a parameter
                that got two gradients in the armed backward, or a backward too many).
        """
        number = self._bucket_of[index]
        if self._finished or number < self.started:
            raise RuntimeError(f"parameter {index} got a gradient after bucket {number} was summed over the ranks")
        if index in self._armed and index not in self._ready:
            self._ready.add(index)
            self._missing[number] -= 1
            while self.started < len(self.buckets) and not self._missing[self.started]:
                self._start()

    def finish(self) -> None:
        """Start what is not started yet (parameters without a gradient in this step included) and wait for all.

        On a GPU it is the current stream that waits.

        Raises:
            RuntimeError: called twice in a step, which would sum sums.
        """
        if self._finished:
            raise RuntimeError("gradients of this step are already summed")
        while self.started < len(self.buckets):
            self._start()
        for work in self._works:
            work.wait()
        self._finished = True

    def _start(self) -> None:
        view = self._views[self.started]
        if self.norms is not None:
            self.norms.append(torch.linalg.vector_norm(view))
        self._works.append(dist.all_reduce(view, group=self.group, async_op=True))


@dataclass(frozen=True)
class Piece:
    """What one rank's slice of the flat space holds of a parameter."""

    index: int
    """Of the parameter."""
    start: int
    """First element, counted in the flattened parameter."""
    stop: int
    place: int
    """Where the piece starts in the flat space."""


class FlatShards:
    """The flat space cut into one contiguous, aligned slice a rank (ZeRO stage 1, arXiv 1910.02054, section 5.1).

    Args:
        spans: of the parameters, ascending.
        group: ranks that share the space; None: this process has it all.
        align: every slice starts at a multiple of it, in elements.
    """

    def __init__(self, spans: Sequence[Span], group: dist.ProcessGroup | None, align: int) -> None:
        self.spans, self.group = list(spans), group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.share = -(-spans[-1][1] // (self.size * align)) * align
        """Elements of a slice."""

    @property
    def elements(self) -> int:
        """Length of the flat space: all slices, padding included."""
        return self.size * self.share

    def own(self) -> list[Piece]:
        """The pieces of this rank's slice, ascending; empty when the slice is padding."""
        return self._pieces(self.rank * self.share, self.share)

    def _pieces(self, first: int, count: int) -> list[Piece]:
        """Parameters' pieces within [first, first + count)."""
        found = []
        for index, (start, stop) in enumerate(self.spans):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                found.append(Piece(index, low - start, high - start, low))
        return found

    @torch.no_grad()
    def gather(
        self,
        local: Sequence[torch.Tensor],
        into: Sequence[torch.Tensor | None],
        dtype: torch.dtype,
        device: torch.device,
        chunk_elements: int,
    ) -> None:
        """Put all ranks' pieces together; collective.

        Args:
            local: values of `own()`, 1-D, any float dtype.
            into: 1-D destination of every parameter, any dtype and device; None: not wanted on this rank.
            dtype: of what travels; values are rounded to it on the way.
            device: of what travels.
            chunk_elements: at most so many elements, of all ranks together, are held in a temporary buffer.
        """
        own, base = self.own(), self.rank * self.share
        step = max(1, min(self.share, chunk_elements // self.size))
        for offset in range(0, self.share, step):
            count = min(step, self.share - offset)
            sent = torch.zeros(count, dtype=dtype, device=device)
            targets: list[torch.Tensor] = []
            pieces: list[torch.Tensor] = []
            for piece, values in zip(own, local, strict=True):
                place = piece.place - base - offset
                low, high = max(place, 0), min(place + values.numel(), count)
                if low < high:
                    targets.append(sent[low:high])
                    pieces.append(values[low - place : high - place])
            _copy_all(targets, pieces)
            got = to_receive(sent, (self.size, count), self.group or dist.group.WORLD)
            # As bytes: no backend then needs to know the dtype.
            dist.all_gather_into_tensor(got.view(-1).view(torch.uint8), sent.view(torch.uint8), group=self.group)
            targets, pieces = [], []
            for rank, row in enumerate(got):
                first = rank * self.share + offset
                for piece in self._pieces(first, count):
                    target = into[piece.index]
                    if target is not None:
                        place = piece.place - first
                        targets.append(target[piece.start : piece.stop])
                        pieces.append(row[place : place + piece.stop - piece.start])
            _copy_all(targets, pieces)


def _copy_all(targets: list[torch.Tensor], pieces: list[torch.Tensor]) -> None:
    """Each piece into its target: hundreds of small tensors in a few launches."""
    if targets:
        torch._foreach_copy_(targets, pieces)
