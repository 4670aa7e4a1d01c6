"""What one rank sends, receives and copies in a step, in bytes, and over which link."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pipeline.planner.work import trained_elements
from pipeline.planning.base_form import layer_bytes
from pipeline.planning.context_shards import halo_elements
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.memory import GRADIENT
from pipeline.planning.run_plan import RunPlan
from pipeline.planning.stream import StreamPlan, halo_bytes


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes a rank receives for a layer and micro-batch, whatever the engine is."""

    tensor_forward: float
    """Activations gathered and summed within the tensor-parallel group, a layer's forward pass."""
    tensor_backward: float
    tensor_tiled: float
    """The input of an MLP that makes gate and up again in tiles, gathered once more in its backward."""
    tensor_again: float
    """In the recomputation of a layer that keeps its input alone."""
    halo: float
    """Keys and values of other context ranks, one way; the backward sends as much back."""


@cache
def layer_traffic(plan: LayerPlan) -> LayerTraffic:
    """What travels within a tensor and context group."""
    arch, tp = plan.arch, plan.tp
    # What one gathering or summing of all hidden states brings a rank.
    hidden = plan.tokens() * arch.hidden * plan.width * (tp - 1) / tp
    heads = arch.heads, arch.kv_heads, arch.head_dim
    halo = halo_elements(heads, plan.attention, plan.sequence, tp, plan.cp) * plan.micro_batch * plan.width
    return LayerTraffic(
        # q k v and gate up gather, o and down sum.
        tensor_forward=4 * hidden,
        # The same the other way.
        tensor_backward=4 * hidden,
        tensor_tiled=hidden,
        # Attention's two; the MLP's are in the backward.
        tensor_again=2 * hidden,
        halo=float(halo),
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank receives beside that."""

    gather: float
    """Weights that engine zero3 gathers of other ranks, a layer and pass."""
    copy: float
    """Weights that come from host memory, a layer and pass."""
    parked: float
    """Keys and values of earlier chunks that come from host memory, a layer and pass over a streamed chunk."""
    once: float
    """The same two for the output matrix, a micro-batch and pass: gathered."""
    once_copy: float
    gradients: float
    """Gradients summed and weights gathered over the replicas, an optimizer step."""
    stage: float
    """Activations handed to the next pipeline stage, a micro-batch and way."""


def traffic(plan: RunPlan) -> Traffic:
    """Everything else that travels."""
    config, arch, grid, layer, counts = plan.config, plan.arch, plan.grid, plan.layer, plan.counts
    width, zero3, shards = layer.width, config.parallel.engine == "zero3", grid.dp * grid.cp
    away = config.parallel.offload.params == "cpu"

    def passes(size: float) -> tuple[float, float]:
        if not zero3:
            return 0.0, 0.0
        return size * (shards - 1) / shards, size / shards if away else 0.0

    gather, copy = passes(layer_bytes(layer.base, arch, grid.tp, width))
    once, once_copy = passes((counts.head + counts.embedding) * width / grid.tp)
    parked = 0
    if plan.stream is not None:
        cut = StreamPlan.of(plan.sequence, plan.stream, grid)
        parked = halo_bytes(cut, arch, plan.attention, grid, layer.micro_batch, width).fetched
    return Traffic(
        gather=gather,
        copy=copy,
        parked=float(parked),
        once=once,
        once_copy=once_copy,
        gradients=trained_elements(plan) * (GRADIENT + width) * (shards - 1) / shards,
        stage=layer.tokens() * arch.hidden * width / grid.tp if grid.pp > 1 else 0.0,
    )
