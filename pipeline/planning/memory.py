"""How much memory a run needs, by formula: no torch, nothing is allocated or opened.

One place for the arithmetic that the preflight checks a machine against. It counts training, in bytes of one rank; the
figures it was compared with are in docs/RESULTS.md (tests/unit/planning/test_memory.py holds it to them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.world.grid import GridPlan
from pipeline.config.run import RunConfig
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.stream import StreamPlan, chunk_sizes, halo_bytes
from pipeline.planning.tensors import PROJECTIONS, has_bias, projection_shape
from pipeline.planning.tile_size import tile_tokens

GIB = 2**30
GRADIENT = 4
"""Bytes a trained element: gradients are summed in fp32."""
OPTIMIZER = 12
"""Bytes a trained element: fp32 master and Adam's two moments, cut over dp x cp."""
GATHER_SLOTS = 2
"""Buffers of engine zero3 for gathered weights: of the layer at work and of the next (the output matrix is one too)."""
LOGITS = 3 * 4 * (1 << 25)
"""Bytes of one chunk of the loss: logits, their exponentials and their gradient in fp32 (`loss.CHUNK_LOGITS` each)."""
CUDA_CONTEXT = 3 * GIB
"""What no formula sees: CUDA's context, NCCL's buffers, blocks of the allocator that do not fit together."""
PROCESS = 4 * GIB
"""Host memory of one process: Python, torch, CUDA's host side, and 2 GiB that loading slices may take on top."""


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of a whole model."""

    layer: int
    """Matrices and biases of one layer: frozen."""
    head: int
    """Frozen output matrix; 0 when it is tied to the embedding or trains."""
    embedding: int
    """Frozen embedding; 0 when it trains."""
    norms: int
    """Frozen norms; 0 when they train."""
    trained: int
    """Adapters, and of embedding, norms and output matrix what trains."""


def count_parameters(config: RunConfig, arch: LlamaArch) -> ParameterCounts:
    """Count what is frozen and what trains."""
    shapes = {name: projection_shape(name, arch) for name in PROJECTIONS}
    layer = sum(rows * (columns + has_bias(name, arch)) for name, (rows, columns) in shapes.items())
    embedding, norms = arch.vocab * arch.hidden, (2 * arch.layers + 1) * arch.hidden
    kinds = config.train.trainable
    trained = 0
    if "lora" in kinds:
        trained += arch.layers * config.lora.rank * sum(sum(shapes[target]) for target in config.lora.targets)
    trained += ("embed" in kinds) * embedding + ("norm" in kinds) * norms
    trained += ("lm_head" in kinds and not arch.tied) * embedding
    return ParameterCounts(
        layer=layer,
        head=0 if arch.tied or "lm_head" in kinds else embedding,
        embedding=("embed" not in kinds) * embedding,
        norms=("norm" not in kinds) * norms,
        trained=trained,
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes; the first two are one rank's, by what they hold."""

    gpu: dict[str, int]
    host: dict[str, int]
    host_once: int
    """Once a machine: rank 0 gathers what trains when it saves."""
    checkpoint: int
    """One checkpoint on disk."""

    @property
    def gpu_total(self) -> int:
        """Peak bytes of one GPU."""
        return sum(self.gpu.values())

    def host_total(self, processes: int) -> int:
        """Peak bytes of host memory of a machine that runs `processes` ranks."""
        return processes * sum(self.host.values()) + self.host_once


def estimate_memory(
    config: RunConfig, arch: LlamaArch, grid: GridPlan, recompute: Sequence[RecomputePolicy], stream: int | None = None
) -> MemoryEstimate:
    """What training takes on `grid`.

    A pipeline's first stage is counted: it holds the embedding and as many micro-batches as there are stages, so layer
    inputs do not shrink with pp.

    Args:
        recompute: policy of every layer of the whole model (`planning.recompute`).
        stream: tokens of a streamed sequence at work at once; None: all.
    """
    counts = count_parameters(config, arch)
    width = 4 if config.model.dtype == "fp32" else 2
    shards = grid.dp * grid.cp
    zero3 = config.parallel.engine == "zero3"
    offload = config.parallel.offload
    layers = -(-arch.layers // grid.pp)
    layered = (layers * counts.layer + counts.head + counts.embedding) * width // grid.tp
    if zero3:
        layered //= shards
    trained = counts.trained // grid.tp
    optimizer = OPTIMIZER * trained // shards
    gpu = {
        "frozen norms": counts.norms * width,
        "trained weights": trained * width,
        "gradients": trained * GRADIENT,
        **_activations(config, arch, grid, recompute[:layers], width, min(stream or config.sequence, config.sequence)),
        "context": CUDA_CONTEXT,
    }
    host = {"process": PROCESS}
    (host if offload.params == "cpu" else gpu)["frozen weights, shard" if zero3 else "frozen weights"] = layered
    (host if offload.optimizer == "cpu" else gpu)["optimizer"] = optimizer
    if zero3:
        gpu["gathered weights"] = GATHER_SLOTS * max(counts.layer, counts.head, counts.embedding) * width // grid.tp
    if stream is not None:
        spec = AttentionSpec("s2", config.group, config.attention.shifted_heads)
        cut = StreamPlan.of(config.sequence, stream, grid)
        halos = halo_bytes(cut, arch, spec, grid, config.train.micro_batch, width)
        host["parked halos"], gpu["halos' gradients"] = halos.parked, halos.carried
    saved = OPTIMIZER * counts.trained
    return MemoryEstimate(gpu, host, host_once=saved, checkpoint=saved)


def plan_stream(
    config: RunConfig, arch: LlamaArch, grid: GridPlan, recompute: Sequence[RecomputePolicy], gpu: int | None
) -> int | None:
    """Tokens of a streamed sequence at work at once; None: whole sequences.

    Args:
        gpu: bytes of the smallest GPU, for `train.stream: auto`, which takes the largest chunk of `chunk_sizes` that
            fits by formula, or else the smallest; None: there is none, and the smallest will do.
    """
    stream = config.train.stream
    if not isinstance(stream, str):
        return stream
    sizes = chunk_sizes(config.sequence, config.group, grid)
    fitting = [
        size
        for size in sizes
        if gpu is not None and estimate_memory(config, arch, grid, recompute, size).gpu_total <= gpu
    ]
    return max(fitting, default=sizes[0])


def _activations(
    config: RunConfig, arch: LlamaArch, grid: GridPlan, policies: Sequence[RecomputePolicy], width: int, at_once: int
) -> dict[str, int]:
    """What a layer keeps for the backward pass, and the most that one layer, or the loss, takes while it is at work."""
    tokens = config.train.micro_batch * grid.shard_tokens(at_once)
    query, key_value = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    hidden, ffn, tp = arch.hidden // grid.tp, arch.ffn // grid.tp, grid.tp
    adapted = any(target in ("gate", "up", "down") for target in config.lora.targets)
    full = RecomputePolicy.FULL in policies
    # The layer's input, attention's own sum, queries, keys, values, attention's output twice (as its kernel left it and
    # by heads), gate and up; the product of the two if an adapter reads it.
    everything = 2 * hidden + (3 * query + 2 * key_value) // tp + (3 if adapted else 2) * ffn
    kept = {RecomputePolicy.FULL: hidden, RecomputePolicy.NONE: everything}
    stored = sum(kept[policy] for policy in policies)
    name = "layer inputs" if set(policies) == {RecomputePolicy.FULL} else "activations"
    # Attention's backward: queries, output twice, and their gradients, one of them in fp32; gradients of keys and
    # values, with GQA first by query heads; two hidden states.
    grouped = arch.kv_heads < arch.heads
    attention = ((9 if grouped else 7) * query + 6 * key_value) // tp + 2 * hidden
    if full and not adapted:
        mlp = tokens * (3 * hidden + (3 * query + 2 * key_value) // tp)
        # A checkpointed frozen MLP's wide tensors exist for one tile (`layers.mlp`).
        mlp += min(tokens, tile_tokens(2 * ffn + 2 * arch.hidden, tp)) * (6 * ffn + 4 * arch.hidden)
    else:
        # Gradients of gate, up and their product beside them; sequence parallelism sums whole rows.
        mlp = tokens * (everything * full + 3 * ffn + hidden + arch.hidden * (tp > 1))
    at_work = max(tokens * attention, mlp) * width
    # As many micro-batches are under way as there are stages, of each a stage's layers.
    return {name: tokens * stored * width * grid.pp, "a layer or the loss at work": max(at_work, LOGITS)}
