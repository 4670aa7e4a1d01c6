"""What a fake process group (torch's "fake" backend: one rank measured alone) would leave uninitialized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def to_receive(like: torch.Tensor, shape: tuple[int, ...], group: dist.ProcessGroup | None) -> torch.Tensor:
    """A buffer that `group` is about to fill; under a fake group, which fills nothing, it holds small random numbers.

    Garbage could be NaN, and arithmetic on NaN or zeros draws less power and so runs faster than real work.
    """
    buffer = like.new_empty(shape)
    if dist.get_backend(group) == "fake" and buffer.is_floating_point():
        buffer.normal_(0.0, 0.02)
    return buffer


def all_gather_shares(
    whole: torch.Tensor, mine: torch.Tensor, changed: Sequence[torch.Tensor], group: dist.ProcessGroup | None
) -> dist.Work | None:
    """Start to gather every rank's bytes `mine` into `whole`.

    torch's fake group would copy `mine` all over it, where other dtypes lie, and bytes of another dtype are NaN as
    likely as not. A fake gather fills the others' shares with random numbers where they lie otherwise than what the
    buffer held before, and otherwise leaves what is there: a real one's bytes come beside the computation, where a
    pass over them by a kernel of torch's takes every multiprocessor from it (0.4 ms a layer of 70B on an H200).

    Args:
        whole: bytes, 1-D; `mine` may be a part of it.
        changed: views of it, in the dtypes of what it is to hold; empty if they are those of what it held.

    Returns:
        What to wait for before it is read; None: nothing.
    """
    if dist.get_backend(group) != "fake":
        return dist.all_gather_into_tensor(whole, mine, group=group, async_op=True)
    if changed:
        kept = mine.clone()
        for part in changed:
            _fill(part)
        own = dist.get_rank(group) * len(mine)
        whole[own : own + len(mine)].copy_(kept)
    return None


def _fill(values: torch.Tensor) -> None:
    """With random numbers like a frozen matrix's in any form: a deviation of one for values of 8 bits, and 0.02 for all
    wider ones, scales among them; after `_PERIOD` values they come again, as making them takes longer than a layer."""
    key = values.dtype, values.device
    if key not in _periods:
        numbers = torch.empty(_PERIOD, dtype=values.dtype, device=values.device)
        if values.dtype == torch.uint8:
            numbers.random_(256)
        elif values.element_size() > 1:
            numbers.normal_(0.0, 0.02)
        else:
            numbers.copy_(torch.randn_like(numbers, dtype=torch.float32))
        _periods[key] = numbers
    # As bytes: copying 8-bit floating point needs no kernel of its own then.
    period, flat = _periods[key].view(torch.uint8), values.view(-1).view(torch.uint8)
    whole = len(flat) // len(period) * len(period)
    flat[:whole].view(-1, len(period)).copy_(period)
    flat[whole:].copy_(period[: len(flat) - whole])


_PERIOD = 1 << 22
"""Values; of a matrix of 8192 columns 512 rows."""
_periods: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
_numbers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
"""Random numbers like hidden states, as many as the largest gather so far; read only."""


def all_gather(own: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, dist.Work | None]:
    """Start an all-gather of `own` [l, ...]; under a fake group its result, [T l, ...], is the same every time.

    torch's fake group would copy `own` T times, beside nothing: memory passes that a real gather makes beside the
    computation. So a fake one has a buffer of its own, which nobody reads, for memory's sake, and one buffer of normal
    numbers, of `numbers_bytes`, is read by all: as wide as a norm's output, so that the softmax after it is no mean.

    Returns:
        The result, and what to wait for before it is read; None: nothing.
    """
    whole = own.new_empty((dist.get_world_size(group) * own.shape[0], *own.shape[1:]))
    if dist.get_backend(group) != "fake":
        return whole, dist.all_gather_into_tensor(whole, own, group=group, async_op=True)
    key = (own.dtype, own.device)
    if key not in _numbers or _numbers[key].numel() < whole.numel():
        _numbers[key] = torch.randn(whole.numel(), dtype=own.dtype, device=own.device)
    numbers = _numbers[key][: whole.numel()].view(whole.shape)
    numbers.buffer = whole  # type: ignore[attr-defined]
    return numbers, None


def numbers_bytes() -> int:
    """Memory that only a fake group takes: to be subtracted from a measured peak of allocations."""
    return sum(numbers.nbytes for kept in (_numbers, _periods) for numbers in kept.values())


def reduce_scatter(own: torch.Tensor, partial: torch.Tensor, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Start to sum `partial` [T l, ...] into `own` [l, ...]; under a fake group, which sums nothing, one rank's share.

    Returns:
        What to wait for before `own` is read; None: nothing.
    """
    if dist.get_backend(group) != "fake":
        return dist.reduce_scatter_tensor(own, partial, group=group, async_op=True)
    own.copy_(partial[: own.shape[0]])
    return None


def stand_in() -> None:
    """Let megatron's own gathers and reduce-scatters give numbers under a fake group, as `all_gather` and
    `reduce_scatter` do: torch's would copy, and leave what is summed as found.

    What was found is zeros or garbage, and an embedding of it a forward pass of zeros or NaN: its products take a fifth
    less time on an H100 than those of numbers. Groups that are not fake are not touched.
    """
    from megatron.core.tensor_parallel import mappings  # not before `cpu_standins.install`

    def scatter(own: torch.Tensor, partial: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
        work = reduce_scatter(own, partial, group)
        if work is not None:
            work.wait()

    def gather(own: torch.Tensor, group: dist.ProcessGroup, *rest: Any, **options: Any) -> torch.Tensor:
        if dist.get_backend(group) == "fake" and group.size() > 1:
            return all_gather(own, group)[0]
        result: torch.Tensor = megatrons(own, group, *rest, **options)
        return result

    mappings.dist_reduce_scatter_func = scatter
    if mappings._gather_along_first_dim.__module__ != __name__:
        megatrons, mappings._gather_along_first_dim = mappings._gather_along_first_dim, gather
