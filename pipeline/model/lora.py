"""LoRA on megatron-core's parallel linears (LoRA: arXiv 2106.09685; rsLoRA scale: 2312.03732).

A fused projection (qkv, gate-up) carries one adapter a part, so that they export as separate PEFT modules, yet costs
two matrix products: the A factors stack into one [n r, in], and the B factors are laid out block by block in the
fused row order, [rows, n r] (zeros elsewhere), which is a rearrangement of a few rows, not of activations.

Shapes: S tokens, B batch, I input width, O output width, R rank, n parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.nn import functional

from pipeline.schema import LoraConfig

FuseRows = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Lay the row blocks of the parts (each [rows_part, k], in part order) out as the fused weight's rows."""


class Adapter(torch.nn.Module):
    """One low-rank pair; A starts Kaiming-uniform and B zero, as in PEFT, so that step 0 is the base model."""

    def __init__(self, in_features: int, out_features: int, rank: int, like: torch.Tensor) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.empty(rank, in_features, dtype=like.dtype, device=like.device))
        self.lora_B = torch.nn.Parameter(torch.zeros(out_features, rank, dtype=like.dtype, device=like.device))
        # Drawn in fp32 on the CPU so that a seed gives the same adapters on every device and in every dtype.
        drawn = torch.empty(rank, in_features)
        torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        with torch.no_grad():
            self.lora_A.copy_(drawn)


class AdapterSet(torch.nn.Module):
    """The adapters of one (possibly fused) linear.

    Args:
        lora: rank, scale, dropout.
        parts: name and output rows of every part of the fused weight, in part order.
        adapted: the parts that carry an adapter.
        in_features: input width I.
        like: the base weight, for dtype and device.
        fuse_rows: row layout of the fused weight; None when there is a single part.
    """

    def __init__(
        self,
        lora: LoraConfig,
        parts: Sequence[tuple[str, int]],
        adapted: Sequence[str],
        in_features: int,
        like: torch.Tensor,
        fuse_rows: FuseRows | None,
    ) -> None:
        super().__init__()
        self.lora, self.parts, self.fuse_rows = lora, tuple(parts), fuse_rows
        self.names = tuple(name for name, _ in parts if name in adapted)
        for name, rows in parts:
            if name in adapted:
                self.add_module(name, Adapter(in_features, rows, lora.rank, like))

    def _adapter(self, name: str) -> Adapter:
        adapter = self.get_submodule(name)
        assert isinstance(adapter, Adapter)
        return adapter

    def stacked_a(self) -> torch.Tensor:
        """A factors, [n R, I]."""
        factors: list[torch.Tensor] = [self._adapter(name).lora_A for name in self.names]
        return factors[0] if len(factors) == 1 else torch.cat(factors)

    def fused_b(self) -> torch.Tensor:
        """B factors in the fused row order, [O, n R]; rows of one part meet only that part's columns."""
        if self.fuse_rows is None:
            return self._adapter(self.names[0]).lora_B
        rank, count = self.lora.rank, len(self.names)
        blocks = []
        for name, rows in self.parts:
            if name in self.names:
                before = self.names.index(name) * rank
                blocks.append(functional.pad(self._adapter(name).lora_B, (before, (count - 1) * rank - before)))
            else:
                like = self._adapter(self.names[0]).lora_B
                blocks.append(like.new_zeros(rows, count * rank))
        return self.fuse_rows(blocks)

    def forward(self, input_SBI: torch.Tensor, base_SBO: torch.Tensor) -> torch.Tensor:
        """Add scale * B A x to the base output.

        With dropout the parts of a fused linear share one mask (PEFT draws one a part: the same distribution for each).
        """
        dropped = functional.dropout(input_SBI, self.lora.dropout, self.training)
        low = functional.linear(dropped, self.stacked_a()).flatten(0, -2)
        update_b = self.fused_b()
        flat = base_SBO.flatten(0, -2)
        # addmm reads the base output once and writes the sum once: no separate update tensor.
        return torch.addmm(flat, low, update_b.t(), alpha=self.lora.scale).view_as(base_SBO)


class LoraColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear whose parts may carry adapters; A is replicated, B sharded like the weight's rows."""

    def __init__(
        self,
        *args: Any,
        lora: LoraConfig,
        parts: Sequence[tuple[str, int]],
        adapted: Sequence[str],
        fuse_rows: FuseRows | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = AdapterSet(lora, parts, adapted, self.input_size, self.weight, fuse_rows)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([S, B, O], bias to be added later or None)."""
        base, bias = super().forward(input_, *args, **kwargs)
        return self.adapters(input_, base), bias


class LoraRowParallelLinear(RowParallelLinear):
    """Row-parallel linear with an adapter; A is sharded like the weight's columns, B replicated."""

    def __init__(self, *args: Any, lora: LoraConfig, part: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows = self.output_size
        self.adapters = AdapterSet(lora, [(part, rows)], [part], self.input_size_per_partition, self.weight, None)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([S, B, O], bias to be added later or None)."""
        base, bias = super().forward(input_)
        return self.adapters(input_, base), bias
