"""What a layer that is run again in the backward pass need not make again.

The values that leave a checkpointed layer exist already; only their place in the graph is wanted.
"""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as only activation checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


def placeholder(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of which only the shape matters: one element, of any value, seen everywhere."""
    return like.new_empty(1).expand(shape)
