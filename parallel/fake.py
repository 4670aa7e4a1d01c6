"""What a fake process group (torch's "fake" backend: one rank measured alone) would leave uninitialized."""

from __future__ import annotations

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


_numbers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
"""Small random numbers, as many as the largest gather so far; read only."""


def gathered_from(own: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A buffer [T l, ...] for an all-gather of `own` [l, ...]; under a fake group the same random numbers every time.

    Filling tile after tile would cost a memory pass that a real gather makes beside the computation. So a fake one has
    its own buffer, which nobody reads, for memory's sake, and one filled buffer, of `numbers_bytes`, is read by all.
    """
    whole = own.new_empty((dist.get_world_size(group) * own.shape[0], *own.shape[1:]))
    if dist.get_backend(group) != "fake":
        return whole
    key = (own.dtype, own.device)
    if key not in _numbers or _numbers[key].numel() < whole.numel():
        _numbers[key] = torch.randn(whole.numel(), dtype=own.dtype, device=own.device).mul_(0.02)
    numbers = _numbers[key][: whole.numel()].view(whole.shape)
    numbers.buffer = whole  # type: ignore[attr-defined]
    return numbers


def numbers_bytes() -> int:
    """Memory that only a fake group takes: to be subtracted from a measured peak of allocations."""
    return sum(numbers.nbytes for numbers in _numbers.values())


def scattered_to(own: torch.Tensor, partial: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Under a fake group, give the output of a reduce-scatter, [l, ...], one rank's share of its input [T l, ...]."""
    if dist.get_backend(group) == "fake":
        own.copy_(partial[: own.shape[0]])
