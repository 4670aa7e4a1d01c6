"""Faults for `tools.doctor` to find: each a context manager that plants one in the process that enters it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from parallel.axes.context import HaloExchange
from parallel.axes.halo_plan import Region
from parallel.axes.stream import ParkedHalos
from pipeline.model.attention import layer
from pipeline.model.attention.layer import CoreAttention
from pipeline.model.layers.norm import RMSNorm
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.reduction import GradientReduction


@contextlib.contextmanager
def norms_not_summed(mark: str = "nobody_sums") -> Iterator[None]:
    """Norm gradients are not summed over the tensor-parallel ranks: they carry another mark than theirs."""
    made = RMSNorm.__init__

    def unmarked(self: RMSNorm, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        setattr(self.weight, mark, True)

    with mock.patch.object(RMSNorm, "__init__", unmarked):
        yield


@contextlib.contextmanager
def norms_wrong_group() -> Iterator[None]:
    """Norm gradients are summed over ranks that see other sequences or shards instead of tensor-parallel ones."""
    honest = GradientReduction.finish

    def elsewhere(self: GradientReduction, optimizer: TrainableAdamW) -> None:
        honest(self, optimizer)
        optimizer.sum_marked("summed_elsewhere", self.groups.data)

    with norms_not_summed("summed_elsewhere"), mock.patch.object(GradientReduction, "finish", elsewhere):
        yield


@contextlib.contextmanager
def local_heads() -> Iterator[None]:
    """Heads are split by their index on the rank instead of the global one."""
    made = CoreAttention.__init__

    def local(self: CoreAttention, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.first_head = 0

    with mock.patch.object(CoreAttention, "__init__", local):
        yield


@contextlib.contextmanager
def shifted_halo() -> Iterator[None]:
    """The halo lies one token early: its last token is missing, and one of another group is in it.

    Of a streamed chunk's last layer, where the first pass has no other tokens, it stays right.
    """
    honest = HaloExchange.local_slices

    def shifted(self: HaloExchange, piece: Region) -> tuple[slice, slice, slice]:
        tokens, rows, heads = honest(self, piece)
        early = 1 if tokens.start else 0
        return slice(tokens.start - early, tokens.stop - early), rows, heads

    with mock.patch.object(HaloExchange, "local_slices", shifted):
        yield


@contextlib.contextmanager
def lost_halo_gradient() -> Iterator[None]:
    """What later chunks of a streamed sequence send back is forgotten."""
    honest = ParkedHalos.take_gradient
    with mock.patch.object(ParkedHalos, "take_gradient", lambda *given: torch.zeros_like(honest(*given))):
        yield


@contextlib.contextmanager
def wrap_leak() -> Iterator[None]:
    """The published roll: the first half group of a shifted head also sees the last one. In one process, too."""
    honest = layer.attend

    def leaking(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any, spec: Any, plan: Any, scale: Any
    ) -> Any:
        out, half = honest(q, k, v, layout, spec, plan, scale), spec.group // 2
        if spec.kind != "s2":
            return out
        parts = [out]
        end = layout.rows[0][-1] if layout.rows else layout.sequence  # padding lies behind
        for block in (block for block in plan.blocks if block.shifted):
            queries = q[:half, :, block.q_start : block.q_stop].permute(1, 2, 0, 3)
            keys, values = (
                torch.cat((x[end - half : end], x[:half]))[:, :, block.kv_start : block.kv_stop].permute(1, 2, 0, 3)
                for x in (k, v)
            )
            mask = torch.ones(half, 2 * half, dtype=torch.bool).tril(half)
            seen = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            ).permute(2, 0, 1, 3)
            change = torch.zeros_like(out)
            change[:half, :, block.q_start : block.q_stop] = seen - out[:half, :, block.q_start : block.q_stop]
            parts.append(change)
        return torch.stack(parts).sum(0)

    with mock.patch.object(layer, "attend", leaking):
        yield


wrap_leak.everywhere = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def thawed_frozen_weight() -> Iterator[None]:
    """A frozen weight of one rank changes by one unit in the last place while gradients are summed."""
    honest = GradientReduction.finish

    def writing(self: GradientReduction, *args: Any, **kwargs: Any) -> None:
        honest(self, *args, **kwargs)
        if self.groups.env.rank == self.groups.plan.world_size - 1 > 0:
            first = next(p for _, p in self._model_parameters if not p.requires_grad)  # type: ignore[attr-defined]
            flat = first.detach().view(-1)
            flat[0] = torch.nextafter(flat[0], flat[0] + 1)

    made = GradientReduction.__init__

    def remembering(self: GradientReduction, groups: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        made(self, groups, model, *args, **kwargs)
        self._model_parameters = list(model.canonical_parameters())  # type: ignore[attr-defined]

    with (
        mock.patch.object(GradientReduction, "__init__", remembering),
        mock.patch.object(GradientReduction, "finish", writing),
    ):
        yield
