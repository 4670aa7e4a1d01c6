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


def gathered_from(own: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A buffer [T l, ...] for an all-gather of `own` [l, ...]; under a fake group it holds copies of `own`.

    As `to_receive`, at the price of a copy: a real gather writes as many bytes.
    """
    size = dist.get_world_size(group)
    whole = own.new_empty((size * own.shape[0], *own.shape[1:]))
    if dist.get_backend(group) == "fake":
        whole.view(size, *own.shape).copy_(own)
    return whole


def scattered_to(own: torch.Tensor, partial: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Under a fake group, give the output of a reduce-scatter, [l, ...], one rank's share of its input [T l, ...]."""
    if dist.get_backend(group) == "fake":
        own.copy_(partial[: own.shape[0]])
