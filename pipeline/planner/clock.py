"""Seconds of an optimizer step, by what they go to. The busiest rank counts.

A layer's are in `layer_time`; here is what depends on engine, replicas, stages and offload: waiting for weights, the
loss, the pipeline's bubble and the optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from pipeline.planner.gpus import Gpu
from pipeline.planner.layer_time import FITTED, Fitted, LayerTime, Rates, layer_time, loss_time
from pipeline.planner.parked_time import LayerPass, waits
from pipeline.planner.traffic import Traffic, traffic
from pipeline.planner.work import trained_elements
from pipeline.planning.activations import layer_memory
from pipeline.planning.memory import GRADIENT, OPTIMIZER
from pipeline.planning.recompute import RecomputePolicy, tally
from pipeline.planning.run_plan import RunPlan


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
    grid, micro, moved, rates = plan.grid, plan.batch.accumulation, traffic(plan), Rates(gpu, fitted, alone)
    links = rates.links
    policies = tally(plan.stage_policies)
    parts: defaultdict[str, float] = defaultdict(float)
    hidden, spare = 0.0, float("inf")
    passes: dict[RecomputePolicy, LayerPass] = {}
    for policy, count in policies.items():
        layer = layer_time(plan.layer, policy, rates, rank)
        found, beside, left = _with_weights(plan, layer, policy, moved, rates)
        passes[policy] = _pass(plan, layer, policy, sum(found.values()), moved, rates)
        for name, seconds in found.items():
            parts[name] += count * seconds
        hidden += count * beside
        spare = min(spare, left)
    at_the_end = loss_time(plan.layer, rates)
    if RecomputePolicy.HOST in passes:
        copied, chunks = 2 * policies[RecomputePolicy.HOST] * passes[RecomputePolicy.HOST].out, plan.layer.chunks
        late = sum(waits([passes[policy] for policy in plan.stage_policies], sum(at_the_end.values()) / chunks))
        parts["copies"] += chunks * late
        hidden += chunks * (copied - late)
    for name, seconds in at_the_end.items():
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
    total |= _update(plan, moved, rates)
    return StepTime({name: seconds for name, seconds in total.items() if seconds > 0}, micro * hidden)


def _pass(
    plan: RunPlan, layer: LayerTime, policy: RecomputePolicy, whole: float, moved: Traffic, rates: Rates
) -> LayerPass:
    """One chunk's forward and backward pass through a layer, which takes `whole` seconds of a micro-batch with all that
    is waited for: every pass has its share of that."""
    computed, chunks = sum(layer.parts.values()) - layer.parts["communication"], plan.layer.chunks
    stretched, link = whole / computed / chunks, rates.gpu.rate("pcie")
    out = layer_memory(plan.layer).gate_up / link if policy is RecomputePolicy.HOST else 0.0
    return LayerPass(layer.forward * stretched, layer.backward * stretched, out, moved.copy / link)


def _with_weights(
    plan: RunPlan, layer: LayerTime, policy: RecomputePolicy, moved: Traffic, rates: Rates
) -> tuple[dict[str, float], float, float]:
    """One layer and micro-batch by what its time goes to, its weights fetched; what is hidden beside it; and what the
    links have to spare while it runs forward."""
    grid, links, found, chunks = plan.grid, rates.links, dict(layer.parts), plan.layer.chunks
    twice, whole = 2.0 - 1.0 / chunks, policy is RecomputePolicy.FULL
    # Weights come ahead, beside a layer's pass and for every chunk anew: copied, then gathered. The rest is waited for.
    gather = links.seconds(moved.gather, grid.dp * grid.cp, grid.tp)
    copy = moved.copy / rates.gpu.rate("pcie")
    # A parked halo comes over the same wires.
    parked = moved.parked / rates.gpu.rate("pcie") if copy else 0.0
    early = "early_halos" not in plan.config.train.without

    def fetches(copied: float) -> float:
        # Two ahead or more, one layer's is copied while another's is gathered.
        return gather + copied if plan.config.parallel.offload.ahead == 1 else max(gather, copied)

    fetched, waits = fetches(copy), 0.0
    for passes, seconds, halos in (
        (2 * chunks - 1, layer.forward / chunks, 2 * chunks - 3),
        (chunks, layer.backward / chunks, whole * (chunks - 1)),
    ):
        late = max(0.0, fetched - seconds)
        halos = max(0, halos) if copy else 0
        if early:
            # Enqueued before the weights of layers beyond, it is there in time, and these come so much later.
            with_halo = max(0.0, fetches(copy + parked) - seconds)
        else:
            # Behind the weights that a later layer is sent meanwhile: attention waits for it in the midst of its layer.
            # Of the heads half have none, and are done first.
            with_halo = max(late, copy - layer.before_halo / chunks)
        waits += (passes - halos) * late + halos * with_halo
    # A pass begins with what the last one ended with, which its buffers still hold.
    waits *= max(0, plan.arch.layers - plan.config.parallel.offload.ahead) / plan.arch.layers
    gather, copy = chunks * gather, chunks * copy
    # Beside the computation a collective still takes multiprocessors and memory from it: that share is in FITTED.links.
    share = copy / (gather + copy) if copy else 0.0
    found["copies"] = waits * share
    found["communication"] += waits * (1 - share)
    found["waiting"] = layer.waiting(sum(found.values()))
    return found, (twice + 1.0) * (gather + copy) - waits, max(0.0, layer.forward / chunks - fetched)


def _update(plan: RunPlan, moved: Traffic, rates: Rates) -> dict[str, float]:
    """Once an optimizer step: gradients over the replicas, clipping, AdamW, weights back."""
    grid, gpu, fitted, elements = plan.grid, rates.gpu, rates.fitted, trained_elements(plan)
    own, width = elements / (grid.dp * grid.cp), plan.layer.width
    # Zeroed, summed into, read for the norm.
    seconds = 4 * GRADIENT * elements / rates.memory
    if plan.config.parallel.offload.optimizer == "cpu":
        seconds += own / fitted.host_elements + own * (GRADIENT + width) / gpu.rate("pcie")
    else:
        seconds += own * (2 * OPTIMIZER + GRADIENT + width) / rates.memory
    sums = rates.links.seconds(moved.gradients, grid.dp * grid.cp, grid.tp)
    return {"optimizer": seconds + fitted.step_s, "gradients' sums": sums}
