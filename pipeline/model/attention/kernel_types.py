"""What an attention backend is: its kernels, by signature. `backends` and `flash_packages` fill these in.

Shape suffixes as in `backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(q [B, S, Hq, D], k and v [B, S, Hkv, D], scale) -> [B, S, Hq, D]."""
Varlen = Callable[..., torch.Tensor]
"""(q [Tq, Hq, D], k and v [Tk, Hkv, D], int32 cu_seqlens of q and of k, longest q, longest k, scale) -> [Tq, Hq, D]."""


@dataclass(frozen=True)
class LseKernel:
    """An attention kernel that returns its log-sum-exps, and its backward; tensors are [B, H, S, D] views."""

    name: str
    runs: Callable[[torch.Tensor, torch.Tensor, bool], bool]
    """(q, k, causal) -> whether these shapes and this device will do."""
    forward: Callable[..., tuple[Any, ...]]
    """(q, k, v, causal, scale) -> (out, natural log-sum-exp of [B, H, Sq] or [B, H, Sq, 1], rest for backward...)."""
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """(dout, q, k, v, out, lse, rest, causal, scale) -> (dq, dk, dv)."""


@dataclass(frozen=True)
class Backend:
    """A family of kernels."""

    name: str
    dense: Dense
    varlen: Varlen | None
    """None: irregular layouts run segment by segment through `dense`."""
    lse: tuple[LseKernel, ...] = ()
    """In order of preference; empty: keys in two tensors are joined first."""
