"""Seconds of an optimizer step, by what they go to: counted work over a GPU's rates. The busiest rank counts.

What is counted is in `work` and `traffic`; what is fitted is in FITTED, all of it, to the points that
`tools/bench/points.yaml` marks so. The others are predictions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from pipeline.planner.gpus import Gpu
from pipeline.planner.host_work import operations
from pipeline.planner.traffic import Traffic, traffic
from pipeline.planner.work import LayerWork, Work, layer_work, loss_work, trained_elements
from pipeline.planning.memory import GRADIENT, OPTIMIZER
from pipeline.planning.recompute import RecomputePolicy, tally
from pipeline.planning.run_plan import RunPlan


@dataclass(frozen=True)
class Fitted:
    """The constants that no count gives."""

    products: float = 0.982
    """Rate of products within a step over their rate alone (`Gpu.rate("bf16")`)."""
    attention: float = 0.630
    """Rate of attention's forward on endless segments over what the GPU is sold with."""
    segment: float = 2890.0
    """Tokens of a segment at which attention runs at half that rate."""
    memory: float = 0.78
    """Bytes a second of pointwise work over what the GPU's memory is sold with."""
    layer_s: float = 6.0e-4
    """Seconds of a layer's forward and backward in which the GPU waits, between kernels and for the host."""
    host_op_s: float = 23.3e-6
    """Seconds in which the host hands PyTorch one operation: no layer takes less than its operations."""
    links: float = 0.427
    """Bytes a second that a collective gets beside the computation, over what the link is sold with."""
    host_elements: float = 89.2e6
    """Elements a second that the CPU updates for one rank with the threads that `longspan train --nproc` gives it."""
    thread_elements: float = 78.7e6
    """The same with one thread, which is what torchrun alone leaves a rank."""
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
    plan: RunPlan,
    gpu: Gpu,
    fitted: Fitted = FITTED,
    *,
    alone: bool = False,
    rank: int | None = None,
    one_thread: bool = False,
) -> StepTime:
    """Seconds of one optimizer step.

    Args:
        alone: nothing is sent, as where one GPU stands in for a rank of many (`tools.dry_run`).
        rank: whose; None: of the one that has most to do, for which the others wait.
        one_thread: the CPU computes for a rank with one thread (OMP_NUM_THREADS).
    """
    if one_thread:
        fitted = replace(fitted, host_elements=fitted.thread_elements)
    grid, micro = plan.grid, plan.batch.accumulation
    layer, moved = layer_work(plan.layer, rank), traffic(plan)
    share = float("inf") if alone else fitted.links
    links = _Links(share * _sold_link(gpu), share * (gpu.sold["network"] or 1.0), gpu.gpus_a_node, not alone)
    segment = plan.group if plan.attention.kind == "s2" else plan.sequence
    longest = max(_stage_layers(plan))
    policies = tally(plan.recompute[:longest])
    parts: defaultdict[str, float] = defaultdict(float)
    hidden, spare = 0.0, float("inf")
    for policy, count in policies.items():
        found, beside, left = _layer_seconds(plan, layer, policy, moved, gpu, links, fitted)
        for name, seconds in found.items():
            parts[name] += count * seconds
        hidden += count * beside
        spare = min(spare, left)
    for name, seconds in _seconds(loss_work(plan.layer), gpu, fitted, segment).items():
        # The last stage alone has the loss; with a pipeline it has fewer layers for it (`plan_stages`).
        parts["loss" if name != "products" else "products"] += seconds
    # The output matrix comes while the last layers are at work, and is at hand when the backward begins.
    head = links.seconds(moved.once, grid.dp * grid.cp, grid.tp), moved.once_copy / gpu.rate("pcie")
    away = "copies" if head[1] > head[0] else "communication"
    parts[away] += max(0.0, max(head) - plan.config.parallel.offload.ahead * spare)
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
) -> tuple[dict[str, float], float, float]:
    """One layer and micro-batch by what its time goes to; what is hidden beside it; and what the links have to spare
    while it runs forward."""
    grid = plan.grid
    segment = plan.group if plan.attention.kind == "s2" else plan.sequence
    forward, backward = (_seconds(work, gpu, fitted, segment) for work in (layer.forward, layer.backward))
    backward["attention"] /= BACKWARD_RATE
    again = sum(_seconds(layer.again[policy], gpu, fitted, segment).values())
    # A streamed sequence's chunks run forward twice, but for the last.
    chunks = plan.layer.chunks
    twice = 2.0 - 1.0 / chunks
    ahead = sum(forward.values())
    found = {name: forward[name] + backward[name] for name in forward}
    found["pointwise"] += _seconds(layer.moved[policy], gpu, fitted, segment)["pointwise"]
    found["recompute"] = again + (twice - 1.0) * ahead
    whole = policy is RecomputePolicy.FULL
    tiled = policy in (RecomputePolicy.FULL, RecomputePolicy.GATE_UP)
    products_before = _seconds(layer.entry, gpu, fitted, segment)["products"]
    exchanged = twice * moved.tensor_forward + moved.tensor_backward
    exchanged += (moved.tensor_again if whole else 0.0) + (moved.tensor_tiled if tiled else 0.0)
    halo = links.seconds(moved.halo * (1 + whole + twice), grid.cp, grid.tp)
    found["communication"] = links.seconds(exchanged, grid.tp, 1) + halo
    # Weights come ahead, beside a layer's pass and for every chunk anew: copied, then gathered. The rest is waited for.
    gather = links.seconds(moved.gather, grid.dp * grid.cp, grid.tp)
    copy = moved.copy / gpu.rate("pcie")
    # A parked halo comes over the same wires.
    parked = moved.parked / gpu.rate("pcie") if copy else 0.0
    early = "early_halos" not in plan.config.train.without

    def fetches(copied: float) -> float:
        # Two ahead or more, one layer's is copied while another's is gathered.
        return gather + copied if plan.config.parallel.offload.ahead == 1 else max(gather, copied)

    fetched, waits = fetches(copy), 0.0
    for passes, seconds, halos in (
        (2 * chunks - 1, ahead / chunks, 2 * chunks - 3),
        (chunks, (sum(backward.values()) + again) / chunks, whole * (chunks - 1)),
    ):
        late = max(0.0, fetched - seconds)
        halos = max(0, halos) if copy else 0
        if early:
            # Enqueued before the weights of layers beyond, it is there in time, and these come so much later.
            with_halo = max(0.0, fetches(copy + parked) - seconds)
        else:
            # Behind the weights that a later layer is sent meanwhile: attention waits for it in the midst of its layer.
            # Of the heads half have none, and are done first.
            with_halo = max(late, copy - (products_before + forward["attention"] / 2) / chunks)
        waits += (passes - halos) * late + halos * with_halo
    # A pass begins with what the last one ended with, which its buffers still hold.
    waits *= max(0, plan.arch.layers - plan.config.parallel.offload.ahead) / plan.arch.layers
    gather, copy = chunks * gather, chunks * copy
    # Beside the computation a collective still takes multiprocessors and memory from it: that share is in FITTED.links.
    share = copy / (gather + copy) if copy else 0.0
    found["copies"] = waits * share
    found["communication"] += waits * (1 - share)
    passes_of_both = chunks * (1 + twice) / 2
    short = fitted.host_op_s * operations(plan.layer, policy) * passes_of_both - sum(found.values())
    found["waiting"] = max(fitted.layer_s * passes_of_both, short)
    return found, (twice + 1.0) * (gather + copy) - waits, max(0.0, ahead / chunks - fetched)


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
