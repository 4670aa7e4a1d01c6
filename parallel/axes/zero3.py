"""ZeRO-3 for frozen weights: DeepSpeed's partitioned parameters, one flat parameter a unit, gathered in a known order.

A unit is what is used together: the matrices of one layer, the output matrix, a frozen embedding. It is bytes, so that
matrices and scales of any dtype share it. DeepSpeed's `zero.Init` cuts its flat parameter into one share a rank.
DeepSpeed's own coordinator is not used: it learns the order of modules from a trace, allocates a new buffer for every
gather, copies from host memory synchronously and cannot leave trained parameters whole. A transformer's order is known,
so that a few static buffers suffice: while one unit is computed with, the next ones are copied and gathered into the
others. Copies and gathers have a stream each: one unit is copied while the one before it is gathered.

What trains stays whole on every rank, with its gradient sums; its optimizer state is sharded by
`pipeline.training.optimizer`.
The only file that imports deepspeed (ZeRO-3: arXiv 1910.02054, section 5.3; offload: arXiv 2104.07857).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from parallel.axes.pinned import pin, unpin, whole_pages
from parallel.errors import LongspanError
from parallel.world.groups import Groups
from parallel.world.lone_rank import all_gather_shares
from parallel.world.rank_env import local_rank_exported

ALIGN = 128
"""Bytes: every parameter starts at a multiple of this in its unit; matrix kernels want 16-byte addresses."""


class _Mpu:
    """DeepSpeed's view of the grid: what it calls data parallel is dp x cp, and model parallel is tp.

    Without `initialize_sequence_parallel` on purpose: DeepSpeed would then ignore model parallelism.
    """

    def __init__(self, groups: Groups) -> None:
        self._data, self._model = groups.data, groups.collection.tp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share the weights' shards."""
        return self._data

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self._data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor-parallel ranks."""
        return self._model

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self._model)

    def get_model_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self._model)


def deepspeed_config(dtype: torch.dtype, micro_batch: int, accumulation: int, replicas: int) -> dict:
    """The whole configuration DeepSpeed is given; nothing else configures it.

    Learning rate, schedule, clipping and the optimizer are not its business here, so it cannot change them.

    Args:
        dtype: of the weights, bf16 or fp32.
        micro_batch: sequences a forward pass.
        accumulation: forward passes an optimizer step.
        replicas: dp x cp, what DeepSpeed takes for data parallelism.
    """
    return {
        "train_batch_size": micro_batch * accumulation * replicas,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": dtype is torch.bfloat16},
        # No offload_param: where shares lie is decided in `allocate`.
        # memory_efficient_linear would replace torch.nn.functional.linear for the whole process; megatron's linears
        # keep no copies anyway.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }


@dataclass
class Unit:
    """Matrices that are used together, as one flat parameter of bytes."""

    name: str
    parameters: list[Parameter]
    shapes: list[torch.Size]
    spans: list[tuple[int, int]]
    """[start, stop) of every parameter in the flat one, bytes."""
    size: int
    """Bytes of all shares together."""
    flat: Any = None
    """DeepSpeed's partitioned parameter; `flat.ds_tensor` is this rank's share."""
    slot: int | None = None
    """Which buffer holds it, or is being filled with it."""
    ready: Any = None
    """Awaited before use: a CUDA event, or the work handle of the gather."""

    def whole(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """The parameters [O, ...] as they lie in a buffer of bytes that holds the gathered unit: views."""
        return [
            slot[start:stop].view(parameter.dtype).view(shape)
            for parameter, shape, (start, stop) in zip(self.parameters, self.shapes, self.spans, strict=True)
        ]


@dataclass(frozen=True)
class ShardPiece:
    """A stretch of one parameter in this rank's share."""

    parameter: Parameter
    shape: torch.Size
    """The parameter's, when whole."""
    start: int
    """First byte, counted in the flattened parameter."""
    target: torch.Tensor
    """Where its values go, uint8, 1-D: a view of the share."""

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.shape[1:].numel() * self.parameter.element_size()

    def rows(self, first: int, last: int) -> tuple[int, int] | None:
        """[start, stop) of the parameter's rows within [first, last) that this holds some of; None: none."""
        low = max(first, self.start // self.row)
        high = min(last, -(-(self.start + len(self.target)) // self.row))
        return (low, high) if low < high else None

    def fill(self, first: int, rows: torch.Tensor) -> int:
        """Copy what this holds of rows `first` and on, of any dtype and device; returns how many bytes that is.

        A share begins and ends anywhere: of its first and last row it may hold a part.
        """
        values = rows.to(self.parameter.dtype).contiguous().view(torch.uint8).flatten()
        offset = first * self.row
        begin, end = max(offset, self.start), min(offset + len(values), self.start + len(self.target))
        if begin >= end:
            return 0
        self.target[begin - self.start : end - self.start].copy_(values[begin - offset : end - offset])
        return end - begin


class FrozenShards:
    """Sharded frozen matrices and when they are whole.

    Use: `add` every unit in the order of the forward pass, `allocate`, fill `pieces`, and then call `use` whenever a
    unit is about to be computed with, on every rank of dp x cp in the same order.

    Args:
        groups: shards are made over `groups.data`.
        offload: keep the shares in (pinned) host memory.
        config: from `deepspeed_config`.
        ahead: units that are fetched before they are needed, 1 or more; there is a buffer for each and one more.
    """

    def __init__(self, groups: Groups, offload: bool, config: dict[str, Any], ahead: int = 1) -> None:
        self.groups, self.offload, self.config = groups, offload, config
        self.ahead = ahead
        self.group, self.device = groups.data, groups.device
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.units: list[Unit] = []
        self.order: list[Unit] = []
        """Unit of every position of the forward pass; one may come twice (a tied embedding)."""
        self._backward = False
        self._ids: set[int] = set()
        self._slots: list[torch.Tensor] = []
        self._holds: list[Unit | None] = [None] * (ahead + 1)
        self._streams = (torch.cuda.Stream(), torch.cuda.Stream()) if self.device.type == "cuda" else None
        """Of copies from host memory, and of gathers."""
        self._arena: torch.Tensor | None = None
        self._pinned = 0

    def add(self, name: str, parameters: Sequence[Parameter], shapes: Sequence[torch.Size]) -> int:
        """Shard these parameters, never allocated whole; returns the unit's position.

        Args:
            parameters: empty ones, on the device of the model, of any dtypes. One is empty again while it is not
                gathered, so that using it then is an error, never a wrong value.
            shapes: theirs when whole.
        """
        end, spans = 0, []
        for parameter, shape in zip(parameters, shapes, strict=True):
            size = shape.numel() * parameter.element_size()
            spans.append((end, end + size))
            end += -(-size // ALIGN) * ALIGN
        share = -(-end // (self.world * ALIGN)) * ALIGN
        unit = Unit(name, list(parameters), list(shapes), spans, self.world * share)
        self.units.append(unit)
        self._ids |= {id(parameter) for parameter in parameters}
        self.order.append(unit)
        return len(self.order) - 1

    def again(self, position: int) -> int:
        """Append a second use of the unit at `position`; returns the new position."""
        self.order.append(self.order[position])
        return len(self.order) - 1

    def allocate(self) -> None:
        """Partition every unit and allocate the gather buffers; shares hold nothing yet.

        Raises:
            LongspanError: host memory cannot be pinned.
        """
        if self.offload:
            # One block of our own: DeepSpeed would first copy to another what holds nothing yet, and its pinned blocks
            # are rounded up to powers of two (143 GiB for 128 at 70B).
            size = sum(unit.size for unit in self.units) // self.world
            self._arena = whole_pages(size)[:size]
            if self.device.type == "cuda":
                self._pin(self._arena)
        begin = 0
        with local_rank_exported(self.groups.env):
            zero = _zero()
            for unit in self.units:
                unit.flat = self._partition(zero, unit)
                share = unit.flat.ds_tensor.ds_numel
                assert share * self.world == unit.size
                if self._arena is not None:
                    # Before the next unit: the GPU never holds shares of more than one.
                    unit.flat.ds_tensor.data = self._arena[begin : begin + share]
                    begin += share
        largest = max(unit.size for unit in self.units)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in self._holds]

    def _partition(self, zero: Any, unit: Unit) -> Any:
        """A unit's flat parameter as DeepSpeed keeps it."""
        holder = torch.nn.Module()
        holder.flat = Parameter(torch.empty(unit.size, dtype=torch.uint8, device=self.device), requires_grad=False)
        zero.Init(
            module=holder,
            data_parallel_group=self.group,
            config_dict_or_path=self.config,
            dtype=torch.bfloat16,  # of floating parameters, which bytes are not; it wants to be told one
            mpu=_Mpu(self.groups),
        )
        return holder.flat

    def pieces(self) -> Iterator[ShardPiece]:
        """What this rank's shares hold of every parameter; to be filled once, before the first `use`."""
        for unit in self.units:
            share = unit.flat.ds_tensor
            first = self.rank * share.numel()
            for parameter, shape, (start, stop) in zip(unit.parameters, unit.shapes, unit.spans, strict=True):
                low, high = max(start, first), min(stop, first + share.numel())
                if low < high:
                    yield ShardPiece(parameter, shape, low - start, share[low - first : high - first])

    def shares(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(unit, this rank's share), bytes, 1-D; padding between parameters has any value."""
        for unit in self.units:
            yield unit.name, unit.flat.ds_tensor.data

    def holds(self, parameter: Parameter) -> bool:
        """Whether a parameter is sharded here."""
        return id(parameter) in self._ids

    @property
    def copies(self) -> torch.cuda.Stream | None:
        """The stream that weights come on from host memory, unit after unit: what else is copied there comes before all
        that is fetched later. None: a CPU has none."""
        return None if self._streams is None else self._streams[0]

    @property
    def pinned_bytes(self) -> int:
        """Bytes of page-locked host memory: exactly the shares."""
        return self._pinned

    @contextlib.contextmanager
    def going_backward(self) -> Iterator[None]:
        """Within, units are used from the last to the first."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    def use(self, position: int) -> None:
        """Make the unit at `position` whole before what is launched next, and start on those after it.

        Units used before may be overwritten from here on: everything that reads them must have been launched.
        """
        way = -1 if self._backward else 1
        places = (position + way * far for far in range(self.ahead + 1))
        wanted = [self.order[place] for place in places if 0 <= place < len(self.order)]
        unit = wanted[0]
        if unit.slot is None:
            self._fetch(unit, wanted)
        if unit.ready is not None:
            if self._streams is not None:
                torch.cuda.current_stream().wait_event(unit.ready)
            else:
                unit.ready.wait()
            unit.ready = None
        for following in wanted[1:]:
            if following.slot is None:
                self._fetch(following, wanted)

    def _fetch(self, unit: Unit, keep: Sequence[Unit]) -> None:
        """Start to gather a unit into a buffer that holds none of `keep`."""
        others = [n for n, held in enumerate(self._holds) if held is None or not any(held is one for one in keep)]
        number = min(others, key=lambda n: self._holds[n] is not None)  # a free one, if there is one
        evicted = self._holds[number]
        unfinished = None if evicted is None else evicted.ready
        if evicted is not None:
            self._evict(evicted)
        self._holds[number], unit.slot = unit, number
        whole = self._slots[number][: unit.size]
        share = unit.flat.ds_tensor.data
        parts = unit.whole(whole)
        for parameter, values in zip(unit.parameters, parts, strict=True):
            parameter.data = values
        changed = [] if evicted is not None and evicted.spans == unit.spans else parts
        if self._streams is None:
            if self.world == 1:
                whole.copy_(share)
            else:
                unit.ready = all_gather_shares(whole, share, changed, self.group)
            return
        copies, gathers = self._streams
        # Kernels launched so far may still read what the buffer held.
        copies.wait_stream(torch.cuda.current_stream())
        if unfinished is not None:
            # And it may still be filled: with a unit that was fetched ahead and not used, as a chunk without loss does.
            copies.wait_event(unfinished)
        mine = share
        with torch.cuda.stream(copies):
            if self.world == 1 or share.device.type == "cpu":
                mine = whole[self.rank * share.numel() : (self.rank + 1) * share.numel()]
                mine.copy_(share, non_blocking=True)
            unit.ready = copies.record_event()
        if self.world > 1:
            with torch.cuda.stream(gathers):
                gathers.wait_event(unit.ready)
                # In place: this rank's part of the buffer is where the gather would put it.
                work = all_gather_shares(whole, mine, changed, self.group)
                if work is not None:
                    work.wait()
                unit.ready = gathers.record_event()

    def _evict(self, unit: Unit) -> None:
        if unit.ready is not None and self._streams is None:
            unit.ready.wait()
        unit.slot, unit.ready = None, None
        for parameter in unit.parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)

    def _pin(self, arena: torch.Tensor) -> None:
        """Page-lock host memory as it is, without rounding."""
        size = arena.numel() * arena.element_size()
        error = pin(arena)
        if error:
            raise LongspanError(
                f"parallel.offload.params: {size / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error "
                f"{error}); raise `ulimit -l`, or free host memory."
            )
        self._pinned = size

    def close(self) -> None:
        """Unpin the host memory."""
        if self._pinned and self._arena is not None:
            unpin(self._arena)
            self._pinned = 0


def _zero() -> Any:
    """deepspeed.zero, with DeepSpeed's communication layer on top of torch's process group."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed  # imports for seconds, and only this engine needs it

    # On CPUs it would compile a shared-memory all-reduce, for minutes, which nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed.zero
