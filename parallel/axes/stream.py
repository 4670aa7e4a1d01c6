"""Context parallelism in time: the halo exchange of a sequence that runs chunk after chunk through the same ranks.

A streamed sequence is cut into chunks, and a chunk into one shard a context-parallel rank; shards are numbered through
(shard c * size + r is rank r's part of chunk c), and one `HaloPlan` says which shard needs what of which. A message
within a chunk travels between ranks, as ever. One to a later chunk is parked by its sender in host memory; when that
chunk is at work, its sender brings it back and hands it over, mostly to itself. Backward, chunks come in reverse, and
the gradients of what was parked wait on the device until the sender's own backward adds them.

Copies to one GPU go one after the other, and engine zero3 sends whole layers that way (`axes.zero3`). So whoever knows
that a layer will run soon has its messages brought (`ParkedHalos.bring`) before weights of layers beyond are copied; a
message that nobody had brought is copied when it is asked for, behind all that is under way.

Shape suffixes: L tokens of a shard, B rows, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.axes.context import Flight, HaloExchange, acquaint, post
from parallel.axes.halo_plan import ALIGN, HaloPlan, Message, Region
from parallel.axes.pinned import pin, unpin, whole_pages
from parallel.errors import LongspanError
from parallel.world.context_shard import ContextShard
from parallel.world.lone_rank import to_receive

SLAB = 1 << 26
"""Bytes of host memory taken, and page-locked, at once."""

Key = tuple[int, int, int]
"""(layer, sending shard, receiving shard)."""


def key_of(layer: int, message: Message) -> Key:
    """What a layer's message is parked as."""
    return layer, message.sender, message.receiver


@dataclass(frozen=True)
class Route:
    """A chunk's messages as one rank sees them; every list is in the plan's order."""

    incoming: tuple[Message, ...]
    """To this rank's shard of the chunk."""
    near: tuple[Message, ...]
    """From it to other shards of the chunk."""
    later: tuple[Message, ...]
    """From it to later chunks."""
    lent: tuple[Message, ...]
    """From this rank's shards of earlier chunks to other ranks' of this chunk."""
    size: int
    """Context-parallel ranks."""

    @classmethod
    def of(cls, plan: HaloPlan, chunk: int, rank: int, size: int) -> Route:
        """Of chunk number `chunk` for rank `rank` of `size`."""
        here = chunk * size + rank
        return cls(
            incoming=plan.incoming(here),
            near=tuple(m for m in plan.outgoing(here) if m.receiver // size == chunk),
            later=tuple(m for m in plan.outgoing(here) if m.receiver // size > chunk),
            lent=tuple(
                m
                for m in plan.messages
                if m.sender // size < chunk == m.receiver // size and m.sender % size == rank and m.receiver != here
            ),
            size=size,
        )

    def is_own(self, message: Message) -> bool:
        """Whether an incoming message is one that this rank parked itself."""
        sender, receiver = message.sender, message.receiver
        return sender % self.size == receiver % self.size

    @property
    def parked(self) -> tuple[Message, ...]:
        """What this rank parked for this chunk, for other ranks and for itself."""
        return *self.lent, *(message for message in self.incoming if self.is_own(message))


class ParkedHalos:
    """What one rank parks of the sequence under way: K and V in host memory, their gradients on the device.

    Host memory is taken as it is needed, page-locked where the device is a GPU, and kept for the next sequence. Copies
    run on a stream of their own, beside the computation.

    Args:
        device: of K and V.
        inbound: stream of copies to the device, on which they come in the order they are asked for among whatever else
            is copied there; None: that of copies to host memory.
    """

    def __init__(self, device: torch.device, inbound: torch.cuda.Stream | None = None) -> None:
        self._device, self._pins = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._pins else None
        self._inbound = self._stream if inbound is None else inbound
        self._slabs: list[torch.Tensor] = []
        self._slab, self._used = 0, 0
        self._halos: dict[Key, tuple[torch.Tensor, torch.cuda.Event | None]] = {}
        """Host memory, and the end of the copy to it."""
        self._coming: dict[Key, tuple[torch.Tensor, list[Any]]] = {}
        """Brought and not yet fetched."""
        self._gradients: dict[Key, torch.Tensor] = {}

    def begin(self) -> None:
        """A new sequence: whatever is left of the last one, which may have been abandoned, is forgotten."""
        self._slab = self._used = 0
        # Copies under way still write to memory that is given back here: it is reused after them.
        for _, works in self._coming.values():
            for work in works:
                work.wait()
        self._coming.clear()
        self._halos.clear()
        self._gradients.clear()

    @property
    def host_bytes(self) -> int:
        """Host memory taken."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def waiting(self) -> int:
        """Gradients that no backward has fetched yet; 0 once a sequence is done."""
        return len(self._gradients)

    @property
    def coming(self) -> int:
        """Messages that were brought and that nobody has fetched yet; 0 once a sequence is done."""
        return len(self._coming)

    def reserve(self, size: int) -> None:
        """Take so much host memory now, in one piece, unless there is as much.

        Raises:
            LongspanError: it cannot be page-locked.
        """
        if size > self.host_bytes:
            self.close()
            self._slabs.append(self._new_slab(size))

    def park(self, key: Key, packed: torch.Tensor) -> None:
        """Copy a packed message to host memory.

        Raises:
            LongspanError: it cannot be page-locked.
        """
        place = self._take(packed.nbytes)[: packed.nbytes].view(packed.dtype)
        if self._stream is None:
            place.copy_(packed)
            self._halos[key] = place, None
            return
        # After what computes it; and after whatever was copied from this place for the last sequence, which the
        # computation has waited for.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            place.copy_(packed, non_blocking=True)
            self._halos[key] = place, self._stream.record_event()
        packed.record_stream(self._stream)

    def bring(self, key: Key) -> None:
        """Start to copy a parked message to the device, unless it is on its way: before what is enqueued after it."""
        if key not in self._coming:
            self._coming[key] = self._copy(key)

    def fetch(self, key: Key) -> tuple[torch.Tensor, list[Any]]:
        """A parked message on the device, and what to wait for before it is read; copied now if nobody brought it."""
        return self._coming.pop(key) if key in self._coming else self._copy(key)

    def _copy(self, key: Key) -> tuple[torch.Tensor, list[Any]]:
        """Enqueue the copy of a parked message to the device."""
        place, parked = self._halos[key]
        if self._inbound is None or parked is None:
            return place.clone(), []
        packed = torch.empty(place.shape, dtype=place.dtype, device=self._device)
        # The memory may have been another tensor's, which kernels under way still read.
        self._inbound.wait_stream(torch.cuda.current_stream())
        self._inbound.wait_event(parked)
        with torch.cuda.stream(self._inbound):
            packed.copy_(place, non_blocking=True)
            return packed, [_Copied(self._inbound.record_event())]

    def keep_gradient(self, key: Key, gradient: torch.Tensor) -> None:
        """Until the sender's backward takes it."""
        self._gradients[key] = gradient

    def take_gradient(self, key: Key) -> torch.Tensor:
        """Once, in the sender's backward."""
        return self._gradients.pop(key)

    def _take(self, size: int) -> torch.Tensor:
        """Host memory of the sequence under way, uint8 [size]."""
        size = -(-size // ALIGN) * ALIGN
        while self._slab < len(self._slabs) and self._slabs[self._slab].numel() - self._used < size:
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self._slabs):
            self._slabs.append(self._new_slab(max(size, SLAB if self._pins else size)))
        start, self._used = self._used, self._used + size
        return self._slabs[self._slab][start : start + size]

    def _new_slab(self, size: int) -> torch.Tensor:
        if not self._pins:
            return torch.empty(size, dtype=torch.uint8)
        slab = whole_pages(size)
        if error := pin(slab):
            raise LongspanError(
                f"train.stream: {(self.host_bytes + size) / 2**30:.1f} GiB of host memory for halos cannot be pinned "
                f"(CUDA error {error}); raise `ulimit -l`, free host memory, or use larger chunks."
            )
        return slab

    def __del__(self) -> None:
        # Memory freed while page-locked could not be page-locked by whom it is given to next.
        if self._pins and self._slabs:
            self.close()

    def close(self) -> None:
        """Give the host memory back."""
        self.begin()
        if self._pins:
            for slab in self._slabs:
                unpin(slab)
        self._slabs.clear()


class _Copied:
    """A copy on another stream, awaited like a transfer."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """The current stream waits."""
        torch.cuda.current_stream().wait_event(self._event)


class StreamExchange(HaloExchange):
    """One layer's exchange in one pass over a chunk.

    Args:
        shard: this rank's part of the chunk.
        route: the chunk's messages.
        reads: what this rank's calls read.
        layer: its number in the model.
        parked: this rank's.
        parks: copy to host memory what later chunks need; False where an earlier pass has.
    """

    def __init__(
        self,
        shard: ContextShard,
        route: Route,
        reads: Sequence[Region],
        layer: int,
        parked: ParkedHalos,
        parks: bool,
    ) -> None:
        self.shard, self.route, self.reads = shard, route, tuple(reads)
        self.layer, self.parked, self.parks = layer, parked, parks
        self.incoming, self.outgoing = route.incoming, (*route.lent, *route.near)
        """Of this pass: what others parked for this chunk is sent again. A pair's messages go by sending shard."""

    def _key(self, message: Message) -> Key:
        return key_of(self.layer, message)

    def _peers(self, numbers: Sequence[int]) -> list[int]:
        return [number % self.shard.size for number in numbers]

    def send(self, k_LBKD: torch.Tensor, v_LBKD: torch.Tensor) -> Flight:
        """As `Exchange.send`."""
        if self.shard.size > 1:
            acquaint(self.shard.group, k_LBKD.device)
        leaving = []
        for message in self.route.lent:
            packed, works = self.parked.fetch(self._key(message))
            for work in works:
                work.wait()
            leaving.append(packed)
        leaving.extend(self.pack(message, k_LBKD, v_LBKD) for message in self.route.near)
        if self.parks:
            for message in self.route.later:
                self.parked.park(self._key(message), self.pack(message, k_LBKD, v_LBKD))
        arriving, remote, copies = [], [], []
        for message in self.incoming:
            if self.route.is_own(message):
                packed, works = self.parked.fetch(self._key(message))
                copies.extend(works)
            else:
                packed = to_receive(k_LBKD, (message.vectors * k_LBKD.shape[-1],), self.shard.group)
                remote.append((message.sender, packed))
            arriving.append(packed)
        self.shard.meter.sent += sum(buffer.nbytes for buffer in leaving)
        self.shard.meter.received += sum(buffer.nbytes for _, buffer in remote)
        flight = post(
            self.shard.group,
            self._peers([message.receiver for message in self.outgoing]),
            leaving,
            self._peers([sender for sender, _ in remote]),
            [buffer for _, buffer in remote],
        )
        return Flight([*flight.works, *copies], arriving, leaving)

    def send_back(self, grads: Sequence[torch.Tensor], like: torch.Tensor) -> Flight:
        """As `Exchange.send_back`; what this rank parked itself stays here."""
        remote = []
        for message, gradient in zip(self.incoming, self.gradients(grads, like), strict=True):
            if self.route.is_own(message):
                self.parked.keep_gradient(self._key(message), gradient)
            else:
                remote.append((message.sender, gradient))
        leaving = [gradient for _, gradient in remote]
        arriving = [
            to_receive(like, (message.vectors * like.shape[-1],), self.shard.group) for message in self.outgoing
        ]
        self.shard.meter.sent_back += sum(buffer.nbytes for buffer in leaving)
        self.shard.meter.received_back += sum(buffer.nbytes for buffer in arriving)
        return post(
            self.shard.group,
            self._peers([sender for sender, _ in remote]),
            leaving,
            self._peers([message.receiver for message in self.outgoing]),
            arriving,
        )

    def receive_back(self, flight: Flight, dk_LBKD: torch.Tensor, dv_LBKD: torch.Tensor) -> None:
        """As `Exchange.receive_back`, and adds what later chunks' backwards left."""
        arrived = flight.wait()
        lent = len(self.route.lent)
        for message, gradient in zip(self.route.lent, arrived[:lent], strict=True):
            self.parked.keep_gradient(self._key(message), gradient)
        for message, gradient in zip(self.route.near, arrived[lent:], strict=True):
            self.add(message, gradient, dk_LBKD, dv_LBKD)
        for message in self.route.later:
            self.add(message, self.parked.take_gradient(self._key(message)), dk_LBKD, dv_LBKD)
