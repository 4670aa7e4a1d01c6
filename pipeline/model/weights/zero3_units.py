"""Which parameters of a stage engine zero3 shards, and where in its forward and backward they must be whole.

What trains stays whole on every rank, and so do vectors (frozen norms and biases: kilobytes). Frozen matrices are
sharded, the matrices of a layer together; the output matrix and a frozen embedding are units of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter

from parallel.axes.zero3 import FrozenShards
from pipeline.model.chunk import LlamaChunk
from pipeline.planning.trainable import trains


def shard_stage(stage: LlamaChunk, kinds: Sequence[str], shards: FrozenShards) -> None:
    """Give a stage built on the meta device its memory: whole for what trains, shares for frozen matrices.

    Weights are zero yet; `load.load_base` and `load.init_adapters` fill them.

    Args:
        stage: a whole model (engine zero3 has no pipeline stages).
        kinds: train.trainable.
        shards: gets the units and is allocated.
    """
    units: dict[str, list[tuple[Parameter, torch.Size]]] = {}
    for name, meta in list(stage.canonical_parameters()):
        shape, frozen = meta.shape, not trains(name, kinds, stage.arch)
        sharded = frozen and meta.ndim >= 2
        size = torch.Size((0,)) if sharded else shape
        # Zeros: what LoRA's B factors start from.
        parameter = Parameter(torch.zeros(size, dtype=meta.dtype, device=shards.device), requires_grad=not frozen)
        # megatron's marks: how tensor parallelism placed it.
        vars(parameter).update(vars(meta))
        _replace(stage, meta, parameter)
        if sharded:
            units.setdefault(_unit_of(name), []).append((parameter, shape))
    _place(stage, units, shards)


def _unit_of(name: str) -> str:
    """The unit of a canonical parameter: its layer, or itself."""
    return ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") else name


def _replace(stage: LlamaChunk, old: Parameter, new: Parameter) -> None:
    """Put `new` wherever `old` sits in the module tree."""
    for module in stage.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                setattr(module, name, new)


def _place(stage: LlamaChunk, units: dict[str, list[tuple[Parameter, torch.Size]]], shards: FrozenShards) -> None:
    """Register the units in the order of the forward pass, and what makes each whole in time."""

    def add(name: str) -> int | None:
        members = units.get(name)
        return None if members is None else shards.add(name, [p for p, _ in members], [shape for _, shape in members])

    embedding = add("embedding.weight")
    if embedding is not None:
        stage.embedding.register_forward_pre_hook(lambda *_: shards.use(embedding))
    for index, layer in zip(stage.chunk.layers, stage.decoder.layers, strict=True):
        position = add(f"decoder.layers.{index}")
        if position is not None:
            _hook_layer(layer, position, shards)
    output = add("output_layer.weight")
    if stage.arch.tied and embedding is not None:
        output = shards.again(embedding)
    if output is not None:
        stage.call_before_output(lambda: shards.use(output))
    if shards.units:
        shards.allocate()


def _hook_layer(layer: torch.nn.Module, position: int, shards: FrozenShards) -> None:
    """Make a layer's unit whole before its forward, its recomputation and its backward."""

    def before(module: torch.nn.Module, *_: Any) -> None:
        shards.use(position)

    def after(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        hidden = output[0]
        # Runs when the gradient of the output is known, before the layer's own backward. Nothing to undo after it: the
        # next unit's `use` overwrites, when all kernels of this one have been launched.
        if hidden.requires_grad:
            hidden.register_hook(lambda _: shards.use(position))

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
