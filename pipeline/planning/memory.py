"""How much memory a run needs, by formula: no torch, nothing is allocated or opened.

One place for the arithmetic that the preflight checks a machine against. It counts training, in bytes of one rank; the
figures it was compared with are in docs/RESULTS.md (tests/unit/planning/test_memory.py holds it to them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from parallel.world.grid import GridPlan
from pipeline.config.run import RunConfig
from pipeline.config.sections import LoraConfig
from pipeline.planning.activations import layer_memory, peak_of
from pipeline.planning.arch import LlamaArch
from pipeline.planning.base_form import layer_bytes, recipe_bytes
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.recompute import RecomputePolicy, tally
from pipeline.planning.stream import StreamPlan, chunk_sizes, halo_bytes
from pipeline.planning.tensors import PROJECTIONS, has_bias, norm_elements, projection_shape

GIB = 2**30
GRADIENT = 4
"""Bytes a trained element: gradients are summed in fp32."""
OPTIMIZER = 12
"""Bytes a trained element: fp32 master and Adam's two moments, cut over dp x cp."""
CUDA_CONTEXT = 3 * GIB
"""What no formula sees: CUDA's context, NCCL's buffers, blocks of the allocator that do not fit together."""
PROCESS = 4 * GIB
"""Host memory of one process: Python, torch, CUDA's host side, and 2 GiB that loading slices may take on top."""


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of a whole model."""

    layer: int
    """Elements of the matrices and biases of one layer: frozen. What they take: `base_form.layer_bytes`."""
    head: int
    """Frozen output matrix; 0 when it is tied to the embedding or trains."""
    embedding: int
    """Frozen embedding; 0 when it trains."""
    norms: int
    """Frozen norms; 0 when they train."""
    adapters: int
    """A and B of every projection that has them; 0 when they do not train."""
    trained: int
    """Those, and of embedding, norms and output matrix what trains."""


def count_parameters(config: RunConfig, arch: LlamaArch) -> ParameterCounts:
    """Count what is frozen and what trains."""
    return _count(config.lora, config.train.trainable, arch)


@cache
def _count(lora: LoraConfig, kinds: tuple[str, ...], arch: LlamaArch) -> ParameterCounts:
    shapes = {name: projection_shape(name, arch) for name in PROJECTIONS}
    layer = sum(rows * (columns + has_bias(name, arch)) for name, (rows, columns) in shapes.items())
    embedding, norms = arch.vocab * arch.hidden, norm_elements(arch)
    adapters = ("lora" in kinds) * arch.layers * lora.rank * sum(sum(shapes[target]) for target in lora.targets)
    trained = adapters + ("embed" in kinds) * embedding + ("norm" in kinds) * norms
    trained += ("lm_head" in kinds and not arch.tied) * embedding
    return ParameterCounts(
        layer=layer,
        head=0 if arch.tied or "lm_head" in kinds else embedding,
        embedding=("embed" not in kinds) * embedding,
        norms=("norm" not in kinds) * norms,
        adapters=adapters,
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
    config: RunConfig, one: LayerPlan, grid: GridPlan, policies: Sequence[RecomputePolicy]
) -> MemoryEstimate:
    """What training takes on `grid`.

    A pipeline's first stage is counted: it holds the embedding and as many micro-batches as there are stages, so layer
    inputs do not shrink with pp.

    Args:
        one: a layer of a rank of `grid`.
        policies: of a stage's layers, in order (`RunPlan.stage_policies`).
    """
    arch, width, counts = one.arch, one.width, count_parameters(config, one.arch)
    shards = grid.dp * grid.cp
    zero3 = config.parallel.engine == "zero3"
    offload = config.parallel.offload
    layers = -(-arch.layers // grid.pp)
    layer = layer_bytes(config.model.base, arch, grid.tp, width)
    layered = layers * layer + (counts.head + counts.embedding) * width // grid.tp
    if zero3:
        layered //= shards
    trained = counts.trained // grid.tp
    optimizer = OPTIMIZER * trained // shards
    activations, parked = _activations(one, grid.pp, policies)
    gpu = {
        "frozen norms": counts.norms * width,
        "trained weights": trained * width,
        "gradients": trained * GRADIENT,
        **activations,
        "context": CUDA_CONTEXT,
    }
    host = {"process": PROCESS} | ({"gate and up": parked} if parked else {})
    (host if offload.params == "cpu" else gpu)["frozen weights, shard" if zero3 else "frozen weights"] = layered
    (host if offload.optimizer == "cpu" else gpu)["optimizer"] = optimizer
    if config.model.fp8_recipe != "none":
        gpu["frozen weights, again in FP8"] = layers * recipe_bytes(config.model.fp8_recipe, arch, grid.tp)
    if zero3:
        # One buffer for the unit at work, which may be the output matrix, and one for each that is fetched ahead.
        unit = max(layer, max(counts.head, counts.embedding) * width // grid.tp)
        gpu["gathered weights"] = (1 + offload.ahead) * unit
    if one.stream is not None:
        cut = StreamPlan.of(one.sequence, one.stream, grid)
        halos = halo_bytes(cut, arch, one.attention, grid, one.micro_batch, width)
        host["parked halos"], gpu["halos' gradients"] = halos.parked, halos.carried
        if "early_halos" not in config.train.without:
            gpu["a halo fetched ahead"] = halos.fetched
    saved = OPTIMIZER * counts.trained
    return MemoryEstimate(gpu, host, host_once=saved, checkpoint=saved)


def plan_stream(
    config: RunConfig, arch: LlamaArch, grid: GridPlan, policies: Sequence[RecomputePolicy], gpu: int | None
) -> int | None:
    """Tokens of a streamed sequence at work at once; None: whole sequences.

    Args:
        policies: of all layers: streaming has one stage.
        gpu: bytes of the smallest GPU, for `train.stream: auto`, which takes the largest chunk of `chunk_sizes` that
            fits by formula, or else the smallest; None: there is none, and the smallest will do.
    """
    stream, asked = config.train.stream, config.train.gpu_gib
    if not isinstance(stream, str):
        return stream
    if asked is not None:  # what recompute auto may fill is all that a chunk may
        gpu = min(gpu or round(asked * GIB), round(asked * GIB))
    sizes = chunk_sizes(config.sequence, config.group, grid)
    for size in reversed(sizes if gpu is not None else ()):
        layer = LayerPlan.of(config, arch, grid, size)
        if estimate_memory(config, layer, grid, policies).gpu_total <= (gpu or 0):
            return size
    return sizes[0]


def _activations(one: LayerPlan, stages: int, policies: Sequence[RecomputePolicy]) -> tuple[dict[str, int], int]:
    """What layers keep and what the one at work takes, by what it is; bytes of gate and up in host memory.

    As many micro-batches are under way as there are stages, of each a stage's layers.
    """
    layer, counts = layer_memory(one), tally(policies)
    stored, at_work = peak_of(layer, policies)
    name = "layer inputs" if [*counts] == [RecomputePolicy.FULL] else "activations"
    parked = layer.gate_up * counts.get(RecomputePolicy.HOST, 0)
    return {name: stored * stages, "a layer or the loss at work": at_work}, parked * stages
