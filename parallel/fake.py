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
