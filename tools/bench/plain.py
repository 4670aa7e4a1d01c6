"""megatron-core's own layers in place of ours: what their speed is compared with, side by side in one run.

Weights, attention, LoRA's products and loss stay. But tensor-parallel linears gather whole sequences before a product
and sum whole rows after it, an MLP holds its wide tensors for all tokens, a recomputed layer repeats all that its
forward did, norms' outputs are kept, and SwiGLU, RoPE, LoRA's update and norms' gradients are torch's own operations.

Alone, under a fake process group, neither side pays for what is sent (`parallel.world.lone_rank`). Ratios of real runs,
over NCCL, say what a user gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch.nn import functional

from pipeline.model.layers import kernel_choice, linear, lora, residual
from pipeline.model.layers.mlp import TiledMLP
from pipeline.model.layers.swiglu import SwiGlu


def _swiglu(module: SwiGlu, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _sum(x_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
    return residual + x_and_bias[0]


REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (linear.TiledColumnParallelLinear, "forward", ColumnParallelLinear.forward),
    (linear.TiledRowParallelLinear, "forward", RowParallelLinear.forward),
    (linear.LastRowParallelLinear, "forward", RowParallelLinear.forward),
    (TiledMLP, "forward", MLP.forward),
    (SwiGlu, "forward", _swiglu),
    (residual, "_add", _sum),
    (residual, "_add_last", _sum),
    (lora, "recipe_of", lambda output: None),
    (kernel_choice, "load_kernels", lambda device: None),
)
"""(owner, name, megatron's or torch's way)."""


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Within, models run on megatron-core's own layers, whenever they were made."""
    ours = [getattr(owner, name) for owner, name, _ in REPLACED]
    for owner, name, other in REPLACED:
        setattr(owner, name, other)
    try:
        yield
    finally:
        for (owner, name, _), mine in zip(REPLACED, ours, strict=True):
            setattr(owner, name, mine)
