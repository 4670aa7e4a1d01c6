"""Seconds of an optimizer step, by what they go to: counted work over a GPU's rates. The busiest rank counts.

What is counted is in `work` and `traffic`; what is fitted is in FITTED, all of it, to the points that
`tools/bench/points.yaml` marks so. The others are predictions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from pipeline.planner.gpus import Gpu
from pipeline.planner.traffic import Traffic, traffic
from pipeline.planner.work import LayerWork, Work, chunks_of, layer_work, loss_work, trained_elements
from pipeline.planning.memory import GRADIENT, OPTIMIZER
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import RunPlan


@dataclass(frozen=True)
class Fitted:
    """The constants that no count gives."""

    products: float = 0.985
    """Rate of products within a step over their rate alone (`Gpu.rate("bf16")`)."""
    attention: float = 0.636
    """Rate of attention's forward on endless segments over what the GPU is sold with."""
    segment: float = 3250.0
    """Tokens of a segment at which attention runs at half that rate."""
    memory: float = 0.79
    """Bytes a second of pointwise work over what the GPU's memory is sold with."""
    layer_s: float = 0.74e-3
    """Seconds of a layer's forward and backward in which the GPU waits for the host."""
    links: float = 0.42
    """Bytes a second that a collective gets beside the computation, over what the link is sold with."""
    host_elements: float = 87e6
    """Elements a second that the CPU updates for one rank."""
    step_s: float = 0.01
    """Seconds of a step that are neither a layer's nor the loss's."""


FITTED = Fitted()
NEAR_HOP_S, FAR_HOP_S = 1.5e-6, 6e-6
"""Seconds a ring takes from one rank to the next, within a machine and over its network: assumed, not measured here."""
BACKWARD_RATE = 0.92
"""Rate of attention's backward over its forward's, of operations: docs/RESULTS.md, attention alone."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    parts: dict[str, float] = field(default_factory=dict)
    """What the step's time is made of."""
    hidden: float = 0.0
    """Of sending and copying, what goes on beside the computation."""

    @property
    def total(self) -> float:
        """Seconds a step."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda part: self.parts[part])


def _seconds(work: Work, gpu: Gpu, fitted: Fitted, segment: int) -> dict[str, float]:
    """One pass on an otherwise idle GPU."""
    sold = gpu.sold["bf16"] or 0.0
    memory = fitted.memory * (gpu.sold["hbm"] or 0.0)
    products = work.products / gpu.rate("bf16") + (work.rounded / gpu.rate("fp8") if work.rounded else 0.0)
    return {
        "products": products / fitted.products + work.operands / (gpu.sold["hbm"] or 1.0),
        "attention": work.attention * (1 + fitted.segment / segment) / (fitted.attention * sold),
        "pointwise": work.pointwise / memory,
    }


@dataclass(frozen=True)
class _Links:
    """Bytes a second a rank gets from others, by how far apart they are."""

    near: float
    far: float
    node: int
    """GPUs of a machine."""
    waits: bool = True
    """Whether hops take time: they do not where nothing is sent."""

    def seconds(self, received: float, ranks: int, stride: int) -> float:
        """Of a collective of `ranks` that lie `stride` apart: within a machine, or through its network too."""
        if ranks == 1 or not received:
            return 0.0
        nodes = max(1, ranks * stride // self.node)
        hops = ((ranks - nodes) * NEAR_HOP_S + (nodes - 1) * FAR_HOP_S) * self.waits
        if nodes == 1:
            return received / self.near + hops
        # Every GPU of a machine brings in its part of what the machine lacks, and they pass it on among themselves.
        together = max(1, self.node // stride)
        return max(received / self.near if together > 1 else 0.0, received / (self.far * together)) + hops


def step_time(
    plan: RunPlan, gpu: Gpu, fitted: Fitted = FITTED, *, alone: bool = False, rank: int | None = None
) -> StepTime:
    """Seconds of one optimizer step.

    Args:
        alone: nothing is sent, as where one GPU stands in for a rank of many (`tools.dry_run`).
        rank: whose; None: of the one that has most to do, for which the others wait.
    """
    grid, micro = plan.grid, plan.batch.accumulation
    layer, moved = layer_work(plan, rank), traffic(plan)
    share = float("inf") if alone else fitted.links
    links = _Links(share * _sold_link(gpu), share * (gpu.sold["network"] or 1.0), gpu.gpus_a_node, not alone)
    segment = plan.group if plan.attention.kind == "s2" else plan.sequence
    longest = max(_stage_layers(plan))
    policies = Counter(plan.recompute[:longest])
    parts: defaultdict[str, float] = defaultdict(float)
    hidden = 0.0
    for policy, count in policies.items():
        found, beside = _layer_seconds(plan, layer, policy, moved, gpu, links, fitted)
        for name, seconds in found.items():
            parts[name] += count * seconds
        hidden += count * beside
    for name, seconds in _seconds(loss_work(plan), gpu, fitted, segment).items():
        # The last stage alone has the loss; with a pipeline it has fewer layers for it (`plan_stages`).
        parts["loss" if name != "products" else "products"] += seconds
    parts["communication"] += 2 * links.seconds(moved.once, grid.dp * grid.cp, grid.tp)
    parts["copies"] += 2 * moved.once_copy / gpu.rate("pcie")
    if grid.pp > 1:
        parts["communication"] += 2 * moved.stage / (links.far if grid.world_size > gpu.gpus_a_node else links.near)
    total = {name: micro * seconds for name, seconds in parts.items()}
    # Of 1F1B's fill and drain a stage waits pp - 1 micro-batches; interleaving cuts them.
    bubble = (grid.pp - 1) / plan.config.parallel.virtual
    total["pipeline bubble"] = bubble * sum(parts.values())
    total |= _update(plan, moved, gpu, links, fitted)
    return StepTime({name: seconds for name, seconds in total.items() if seconds > 0}, micro * hidden)


def _sold_link(gpu: Gpu) -> float:
    return gpu.sold["nvlink"] or gpu.sold["pcie"] or 1.0


def _stage_layers(plan: RunPlan) -> list[int]:
    stages = plan.grid.pp
    return [sum(len(chunk) for chunk in plan.chunks[stage::stages]) for stage in range(stages)]


def _layer_seconds(
    plan: RunPlan, layer: LayerWork, policy: RecomputePolicy, moved: Traffic, gpu: Gpu, links: _Links, fitted: Fitted
) -> tuple[dict[str, float], float]:
    """One layer and micro-batch by what its time goes to; and what is hidden beside it."""
    grid = plan.grid
    segment = plan.group if plan.attention.kind == "s2" else plan.sequence
    forward, backward = (_seconds(work, gpu, fitted, segment) for work in (layer.forward, layer.backward))
    backward["attention"] /= BACKWARD_RATE
    again = sum(_seconds(layer.again[policy], gpu, fitted, segment).values())
    # A streamed sequence's chunks run forward twice, but for the last.
    chunks = chunks_of(plan)
    twice = 2.0 - 1.0 / chunks
    ahead = sum(forward.values())
    found = {name: forward[name] + backward[name] for name in forward}
    found["recompute"] = again + (twice - 1.0) * ahead
    whole = policy is RecomputePolicy.FULL
    tiled = policy in (RecomputePolicy.FULL, RecomputePolicy.GATE_UP)
    exchanged = twice * moved.tensor_forward + moved.tensor_backward
    exchanged += (moved.tensor_again if whole else 0.0) + (moved.tensor_tiled if tiled else 0.0)
    halo = links.seconds(moved.halo * (1 + whole + twice), grid.cp, grid.tp)
    found["communication"] = links.seconds(exchanged, grid.tp, 1) + halo
    # Weights come one layer ahead, copy before gather, beside a layer's pass, and for every chunk anew; what takes
    # longer is waited for.
    gather = chunks * links.seconds(moved.gather, grid.dp * grid.cp, grid.tp)
    copy = chunks * moved.copy / gpu.rate("pcie")
    waits = 0.0
    passes = ((twice, ahead), (1.0, sum(backward.values()) + again))
    for times, seconds in passes:
        waits += times * max(0.0, gather + copy - seconds)
    # Beside the computation a collective still takes multiprocessors and memory from it: that share is in FITTED.links.
    share = copy / (gather + copy) if copy else 0.0
    found["copies"] = waits * share
    found["communication"] += waits * (1 - share)
    found["waiting"] = fitted.layer_s * chunks * (1 + twice) / 2
    return found, (twice + 1.0) * (gather + copy) - waits


def _update(plan: RunPlan, moved: Traffic, gpu: Gpu, links: _Links, fitted: Fitted) -> dict[str, float]:
    """Once an optimizer step: gradients over the replicas, clipping, AdamW, weights back."""
    grid, elements = plan.grid, trained_elements(plan)
    own = elements / (grid.dp * grid.cp)
    memory = fitted.memory * (gpu.sold["hbm"] or 1.0)
    # Zeroed, summed into, read for the norm.
    bytes_ = 4 * GRADIENT * elements
    seconds = bytes_ / memory
    if plan.config.parallel.offload.optimizer == "cpu":
        seconds += own / fitted.host_elements + own * (GRADIENT + plan.config.model.element_bytes) / gpu.rate("pcie")
    else:
        seconds += own * (2 * OPTIMIZER + GRADIENT + plan.config.model.element_bytes) / memory
    sums = links.seconds(moved.gradients, grid.dp * grid.cp, grid.tp)
    return {"optimizer": seconds + fitted.step_s, "gradients' sums": sums}
