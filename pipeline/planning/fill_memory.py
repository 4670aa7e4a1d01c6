"""`train.recompute: auto`: the policies that compute least again and fit a GPU, by the memory formula; no torch.

A layer's policy is chosen by what it costs: operations in the backward pass that its forward made already. With one
limit, on memory, a mix of two policies is the best there is (but for whole layers); with gate and up in host memory a
third one joins, as only so many copies hide behind the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from parallel.world.grid import GridPlan
from pipeline.config.run import RunConfig
from pipeline.planning.arch import LlamaArch
from pipeline.planning.base_form import layer_bytes
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.memory import GIB, estimate_memory
from pipeline.planning.recompute import RecomputePolicy, plan_recompute
from pipeline.planning.tensors import PROJECTIONS, projection_shape

NODE_GPU = 80 * 10**9
"""Bytes of the GPU that is planned for where there is none: those of the nodes this is written for."""
LEFT = 0.05
"""Share of a GPU that is not filled: the formula's own error, and what a display or another process holds."""
BYTES_AN_OPERATION = 55e9 / 700e12
"""Bytes that go to the host while a GPU makes one 16-bit operation of a product (docs/RESULTS.md; an A100 has the same
ratio)."""
SLOWER = 1.75
"""Time of an operation of attention, in operations of products."""
FASTER_IN_8_BITS = 1.9
"""Products on a base in FP8, against 16 bits."""
PASSES = 4
"""Of the forward pass of a layer over memory beside its products and attention."""
PARTS = 16
"""Numbers of layers that park gate and up in host memory which are looked at, beside none."""
FULL, GATE_UP, HOST, FP8, POINTWISE, NONE = RecomputePolicy


def _operations(arch: LlamaArch, parts: Sequence[str]) -> int:
    """Operations a token of the frozen products of these projections."""
    return 2 * sum(rows * columns for rows, columns in (projection_shape(part, arch) for part in parts))


def _attention(arch: LlamaArch, group: int) -> int:
    """Operations a token of a layer's attention: both products, of half a group on the average."""
    return 2 * group * arch.heads * arch.head_dim


def _pass(arch: LlamaArch) -> int:
    """Operations that a GPU could make while it reads and writes a token's row: some 250 a byte, four bytes a value."""
    return 1000 * arch.hidden


def costs(arch: LlamaArch, group: int) -> dict[RecomputePolicy, float]:
    """Operations a token and layer that each policy makes again; memory passes count as so many operations.

    Args:
        group: tokens of a group, which a query sees half of on the average.
    """
    wide = _operations(arch, ("gate", "up"))
    passes = _pass(arch)
    return {
        FULL: wide + _operations(arch, ("q", "k", "v", "o")) + _attention(arch, group) + 4 * passes,
        GATE_UP: wide + 2 * passes,
        HOST: 3 * passes,
        FP8: 3 * passes,
        POINTWISE: 2 * passes,
        NONE: 0,
    }


def _spread(counts: dict[RecomputePolicy, int], layers: int) -> list[RecomputePolicy]:
    """Policies of a stage's layers, those that keep least first: what runs again takes memory that is free by then.

    Layers that park in host memory are spread among the others, whose computation hides their copies.
    """
    hosts = counts.get(HOST, 0)
    others = [policy for policy in RecomputePolicy if policy is not HOST for _ in range(counts.get(policy, 0))]
    places = {(2 * number + 1) * layers // (2 * hosts) for number in range(hosts)}
    rest = iter(others)
    return [HOST if place in places else next(rest) for place in range(layers)]


def fill_memory(
    config: RunConfig,
    arch: LlamaArch,
    grid: GridPlan,
    chunks: Sequence[range],
    gpu_bytes: int | None,
    stream: int | None = None,
) -> tuple[RecomputePolicy, ...]:
    """The policy of every layer of the whole model.

    All stages get the first one's mix, as it has most micro-batches under way.

    Args:
        config: of the run; train.gate_up says where gate and up may be kept that do not fit the GPU as they are.
        chunks: layers of every pipeline chunk.
        gpu_bytes: memory of a GPU; None: there is none here, and one of NODE_GPU is planned for.
        stream: tokens of a streamed sequence at work at once; None: all.
    """
    asked = config.train.gpu_gib
    limit = round(asked * GIB) if asked is not None else int((gpu_bytes or NODE_GPU) * (1 - LEFT))
    layers = -(-arch.layers // grid.pp)
    cost = costs(arch, config.group if config.attention.kind == "s2" else config.sequence)

    one = LayerPlan.of(config, arch, grid, stream)

    def fits(counts: dict[RecomputePolicy, int]) -> bool:
        return estimate_memory(config, one, grid, _spread(counts, layers)).gpu_total <= limit

    kinds = [FULL, GATE_UP, *([FP8] if config.train.gate_up == "fp8" else []), POINTWISE, NONE]
    most = _most_parked(config, arch, grid, layers) if config.train.gate_up == "host" else 0
    best, least = {FULL: layers}, layers * cost[FULL]
    for hosts in {round(most * part / PARTS) for part in range(PARTS + 1)}:
        beside = {HOST: hosts} if hosts else {}
        for small, large in combinations(kinds, 2):
            found = _most_of(small, large, beside, layers - hosts, cost, least, fits)
            best, least = found or (best, least)
    mix = _spread(best, layers)
    policies = list(plan_recompute("full", arch.layers))
    for stage in range(grid.pp):
        own = [layer for chunk in chunks[stage :: grid.pp] for layer in chunk]
        # A stage may have a layer less than the longest: of those that keep most.
        for layer, policy in zip(own, mix[: len(own)], strict=True):
            policies[layer] = policy
    return tuple(policies)


def _most_of(
    small: RecomputePolicy,
    large: RecomputePolicy,
    beside: dict[RecomputePolicy, int],
    layers: int,
    cost: dict[RecomputePolicy, float],
    least: float,
    fits: Callable[[dict[RecomputePolicy, int]], bool],
) -> tuple[dict[RecomputePolicy, int], float] | None:
    """The mix of two kinds with most layers of the one that keeps more, and its cost; None: none that fits costs less.

    Args:
        beside: layers of a third kind; the other `layers` are mixed.
        least: what a mix must cost less than to be looked for.
    """
    rest = sum(cost[policy] * count for policy, count in beside.items())

    def total(count: int) -> float:
        return rest + (layers - count) * cost[small] + count * cost[large]

    if total(layers) >= least:
        return None
    low = max(0, int((total(0) - least) / (cost[small] - cost[large])))
    while total(low) >= least:
        low += 1
    if not fits({small: layers - low, large: low, **beside}):
        return None
    high = layers
    while low < high:
        middle = (low + high + 1) // 2
        if fits({small: layers - middle, large: middle, **beside}):
            low = middle
        else:
            high = middle - 1
    return {small: layers - low, large: low, **beside}, total(low)


def _most_parked(config: RunConfig, arch: LlamaArch, grid: GridPlan, layers: int) -> int:
    """Layers whose gate and up reach the host while a stage's forward pass is computed."""
    tokens = config.train.micro_batch * grid.shard_tokens(config.sequence)
    group = config.group if config.attention.kind == "s2" else config.sequence
    products = _operations(arch, tuple(PROJECTIONS)) / (FASTER_IN_8_BITS if config.model.base == "fp8" else 1)
    operations = layers * tokens * (products + SLOWER * _attention(arch, group) + PASSES * _pass(arch)) / grid.tp
    width = config.model.element_bytes
    bytes_a_layer = 2 * tokens * arch.ffn // grid.tp * width
    away = 0.0
    if config.parallel.offload.params == "cpu":
        # Shares of the weights come over the same wires, and the backward pass has both.
        each = layer_bytes(config.model.base, arch, grid.tp, width) / (grid.dp * grid.cp)
        away = layers * each
    return min(layers, max(0, int((operations * BYTES_AN_OPERATION - away) // bytes_a_layer)))
