"""Sums over the data-parallel group, in a fixed order, and nothing when the group is one rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def sum_over(group: dist.ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` (any shape, dtype) over `group`, in place; returns it."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def sum_buckets(group: dist.ProcessGroup, buckets: Iterable[torch.Tensor]) -> None:
    """Sum flat fp32 gradient buckets over `group`, all in flight at once, then wait for them."""
    if dist.get_world_size(group) == 1:
        return
    pending = [dist.all_reduce(bucket, group=group, async_op=True) for bucket in buckets]
    for work in pending:
        work.wait()


def any_rank(group: dist.ProcessGroup, flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank of `group`; every rank learns the same answer."""
    return bool(sum_over(group, torch.tensor(int(flag), device=device)).item())
