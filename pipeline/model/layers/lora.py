"""LoRA on megatron-core's parallel linears (LoRA: arXiv 2106.09685; rsLoRA scale: 2312.03732).

A fused projection (qkv, gate-up) carries one adapter a part, so that they export as separate PEFT modules, yet costs
two matrix products: the A factors stack into one [n r, in], and the B factors are laid out block by block in the
fused row order, [rows, n r] (zeros elsewhere), which is a rearrangement of a few rows, not of activations.

Under tensor + sequence parallelism (T ranks) only the low-rank activations travel: a column-parallel linear applies its
replicated A to the local tokens and gathers [S, B, n R]; a row-parallel one reduce-scatters its partial A x before the
replicated B. The replicated factor sees a slice of the tokens, so its gradient is partial and carries megatron's
`sequence_parallel` mark; the sharded one carries `tensor_model_parallel`.

Shapes: S tokens, B batch, I input width, O output width, R rank, n parts; under sharding local sizes, tokens S / T.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from pipeline.config.sections import LoraConfig
from pipeline.model.layers.frozen_weight import FrozenWeight, frozen_weight
from pipeline.model.layers.linear import LastRowParallelLinear
from pipeline.model.layers.lora_functions import AddUpdate, Joint, OfMade, low_rank
from pipeline.model.layers.recipe import recipe_of
from pipeline.model.layers.recomputation import recomputing
from pipeline.model.layers.transformer_engine import norm_inside

FuseRows = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Lay the row blocks of the parts (each [rows_part, k], in part order) out as the fused weight's rows."""
Move = Callable[[torch.Tensor], torch.Tensor]
"""Carries low-rank activations between tensor-parallel ranks, differentiably."""


class Adapter(torch.nn.Module):
    """One low-rank pair, A [R, in] and B [out, R]; B starts at zero, A is filled by `load.init_adapters`."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device | None
    ) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.lora_B = torch.nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))


def initial_a(name: str, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What factor A of the adapter called `name` starts from: Kaiming-uniform as in PEFT, fp32 on the CPU.

    A pure function of its arguments, so that a seed gives the same adapters on every device, dtype and rank grid.

    Args:
        name: canonical tensor name.
        shape: of the whole factor, [R, in].
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


class AdapterSet(torch.nn.Module):
    """The adapters of one (possibly fused) linear, or of a tensor-parallel slice of it.

    Args:
        lora: rank, scale, dropout.
        parts: name and local output rows of every part of the fused weight, in part order.
        adapted: the parts that carry an adapter.
        in_features: local input width I.
        dtype: of the factors, whatever form the base weight is kept in.
        device: of the factors; None: torch's default.
        fuse_rows: row layout of the fused weight; None when there is a single part.
        move: between A and B under tensor parallelism; None: nothing travels.
        fused: use kernels.
        again: make the input again where that is possible (`layers.recipe`) instead of keeping it.
    """

    def __init__(
        self,
        lora: LoraConfig,
        parts: Sequence[tuple[str, int]],
        adapted: Sequence[str],
        in_features: int,
        dtype: torch.dtype,
        device: torch.device | None,
        fuse_rows: FuseRows | None,
        move: Move | None = None,
        fused: bool = True,
        again: bool = True,
    ) -> None:
        super().__init__()
        self.again = again
        self.lora, self.parts, self.fuse_rows, self.move, self.fused = lora, tuple(parts), fuse_rows, move, fused
        self.names = tuple(name for name, _ in parts if name in adapted)
        for name, rows in parts:
            if name in adapted:
                self.add_module(name, Adapter(in_features, rows, lora.rank, dtype, device))

    def mark(self, replicated: str, sharded: str) -> None:
        """Put megatron's marks on the factors (lora_A or lora_B) by how tensor parallelism places them."""
        for name in self.names:
            getattr(self._adapter(name), replicated).sequence_parallel = True
            getattr(self._adapter(name), sharded).tensor_model_parallel = True

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
        """Add scale * B A x to the base output, in place where it has memory of its own.

        With dropout the parts of a fused linear share one mask (PEFT draws one a part: the same distribution for each).
        """
        again = self.again and not (self.lora.dropout and self.training)
        recipe = recipe_of(input_SBI) if again else None
        if recipe is None:
            low = low_rank(self._drop(input_SBI), self.stacked_a())
        else:
            low = OfMade.apply(input_SBI, self.stacked_a(), recipe)
        if self.move is not None:
            low = self.move(low)
        update_b = self.fused_b()
        # A view: megatron's reductions return their input where one rank has nothing to reduce. Not contiguous: a
        # placeholder of a recomputation.
        if base_SBO.is_contiguous() and not base_SBO._is_view():
            sum_SBO: torch.Tensor = AddUpdate.apply(base_SBO, low, update_b, self.lora.scale, self.fused)
            return sum_SBO
        return torch.addmm(base_SBO.flatten(0, -2), low.flatten(0, -2), update_b.t(), alpha=self.lora.scale).view_as(
            base_SBO
        )

    def _drop(self, input_SBI: torch.Tensor) -> torch.Tensor:
        if not self.lora.dropout or not self.training:
            return input_SBI
        if self.move is None:
            return functional.dropout(input_SBI, self.lora.dropout)
        # Tensor-parallel ranks hold different tokens or channels here, so each needs masks of its own.
        with get_cuda_rng_tracker().fork():
            return functional.dropout(input_SBI, self.lora.dropout)


class AdaptedLinear(torch.nn.Module):
    """A parallel linear of any family with low-rank adapters beside it.

    The adapters see the linear's input and add to its output; nothing of the linear is overridden. Its parameters go by
    the names they have without adapters (`LlamaChunk.canonical_parameters`).

    Args:
        base: the linear; one that normalizes its input returns (output, normed input), and the adapters see that.
        adapters: see `AdapterSet`.
        joint: make both products in one autograd function, where nothing has to be sent between them.
    """

    def __init__(self, base: torch.nn.Module, adapters: AdapterSet, joint: bool = False) -> None:
        super().__init__()
        self.base, self.adapters, self.joint, self.normed = base, adapters, joint, norm_inside(base)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, I] -> ([S, B, O], bias to be added later or None), as megatron's parallel linears."""
        weight = None if args or kwargs or not self.joint else self._joinable(input_)
        if weight is not None:
            adapters = self.adapters
            recipe = recipe_of(input_) if adapters.again else None
            bias: Any = self.base.bias
            now, later = (None, bias) if self.base.skip_bias_add else (bias, None)
            factors = adapters.stacked_a(), adapters.fused_b()
            skip = isinstance(self.base, LastRowParallelLinear) and recomputing()
            return Joint.apply(input_, *factors, weight, now, adapters.lora.scale, recipe, skip, adapters.fused), later
        base, bias = self.base(input_, *args, **kwargs)
        if self.normed:
            base, input_ = base
        return self.adapters(input_, base), bias

    def _joinable(self, input_: torch.Tensor) -> FrozenWeight | None:
        """The frozen weight, if product and adapters can be one function here: nothing travels and nothing drops."""
        adapters = self.adapters
        if adapters.move is not None or (adapters.lora.dropout and self.training) or not input_.is_contiguous():
            return None
        return frozen_weight(self.base)


Linear = Callable[..., torch.nn.Module]
"""Builds a parallel linear as megatron's layers do: (I, O, config=, tp_group=, ...), global widths."""


def _place(config: TransformerConfig) -> tuple[torch.dtype, torch.device | None]:
    """dtype and device of what a layer makes: megatron's own rule."""
    device = None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
    return config.params_dtype, device


def adapted_column(
    input_size: int,
    output_size: int,
    *,
    linear: Linear,
    lora: LoraConfig,
    parts: Sequence[tuple[str, int]],
    adapted: Sequence[str],
    fuse_rows: FuseRows | None,
    fused: bool = True,
    again: bool = True,
    joint: bool = False,
    config: TransformerConfig,
    tp_group: dist.ProcessGroup,
    **kwargs: Any,
) -> AdaptedLinear:
    """A column-parallel linear whose parts may carry adapters; A is replicated, B sharded like the weight's rows.

    Args:
        linear: the family's column-parallel linear, which gets all of megatron's arguments.
        parts: name and global output rows of every part of the fused weight.
        adapted, fuse_rows, fused, again, joint: see `AdapterSet` and `AdaptedLinear`.
    """
    base = linear(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
    ranks = _require_sequence_parallel(config, tp_group)
    local = [(name, rows // ranks) for name, rows in parts]
    move = partial(gather_from_sequence_parallel_region, group=tp_group) if ranks > 1 else None
    adapters = AdapterSet(lora, local, adapted, input_size, *_place(config), fuse_rows, move, fused, again)
    if ranks > 1:
        adapters.mark(replicated="lora_A", sharded="lora_B")
    return AdaptedLinear(base, adapters, joint)


def adapted_row(
    input_size: int,
    output_size: int,
    *,
    linear: Linear,
    lora: LoraConfig,
    part: str,
    fused: bool = True,
    again: bool = True,
    joint: bool = False,
    config: TransformerConfig,
    tp_group: dist.ProcessGroup,
    **kwargs: Any,
) -> AdaptedLinear:
    """A row-parallel linear with an adapter; A is sharded like the weight's columns, B replicated.

    Where a recomputation skips the frozen product of a layer's last linear, the adapter still runs.
    """
    base = linear(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
    ranks = _require_sequence_parallel(config, tp_group)
    move = partial(reduce_scatter_to_sequence_parallel_region, group=tp_group) if ranks > 1 else None
    place = _place(config)
    adapters = AdapterSet(lora, [(part, output_size)], [part], input_size // ranks, *place, None, move, fused, again)
    if ranks > 1:
        adapters.mark(replicated="lora_B", sharded="lora_A")
    return AdaptedLinear(base, adapters, joint)


def _require_sequence_parallel(config: TransformerConfig, tp_group: dist.ProcessGroup) -> int:
    """Tensor-parallel ranks of a linear; above one, activations between layers must be sharded along the tokens."""
    ranks = dist.get_world_size(tp_group)
    assert ranks == 1 or config.sequence_parallel, "megatron_config.transformer_config sets it with tp > 1"
    return ranks
