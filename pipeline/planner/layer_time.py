"""Seconds of one layer and micro-batch: counted work over a GPU's rates, and the constants that are fitted.

What is counted is in `work` and `traffic`; what is fitted is in FITTED, all of it, to the points that
`tools/bench/points.yaml` marks so. The others are predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from pipeline.planner.gpus import Gpu
from pipeline.planner.host_work import operations
from pipeline.planner.traffic import layer_traffic
from pipeline.planner.work import Work, layer_work, loss_work
from pipeline.planning.first_pass import share_left
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.recompute import RecomputePolicy


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
class Links:
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


@dataclass(frozen=True)
class Rates:
    """What a GPU and its links do in a second within a step."""

    gpu: Gpu
    fitted: Fitted = FITTED
    alone: bool = False
    """Nothing is sent, as where one GPU stands in for a rank of many."""

    @cached_property
    def links(self) -> Links:
        """To other ranks."""
        sold, share = self.gpu.sold, float("inf") if self.alone else self.fitted.links
        near = sold["nvlink"] or sold["pcie"] or 1.0
        return Links(share * near, share * (sold["network"] or 1.0), self.gpu.gpus_a_node, not self.alone)

    @property
    def memory(self) -> float:
        """Bytes of pointwise work."""
        return self.fitted.memory * (self.gpu.sold["hbm"] or 0.0)

    def seconds(self, work: Work, segment: int) -> dict[str, float]:
        """One pass on an otherwise idle GPU.

        Args:
            segment: tokens that attend among themselves.
        """
        gpu, fitted, sold = self.gpu, self.fitted, self.gpu.sold["bf16"] or 0.0
        products = work.products / gpu.rate("bf16") + (work.rounded / gpu.rate("fp8") if work.rounded else 0.0)
        return {
            "products": products / fitted.products + work.operands / (gpu.sold["hbm"] or 1.0),
            "attention": work.attention * (1 + fitted.segment / segment) / (fitted.attention * sold),
            "pointwise": work.pointwise / self.memory,
        }


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer and micro-batch of a rank that has its weights at hand."""

    parts: dict[str, float]
    """By what they go to; the waiting not."""
    forward: float
    """Of it, the forward pass."""
    backward: float
    """Of it, the backward pass and what is computed again."""
    before_halo: float
    """Of the forward pass, what needs no keys of other chunks: the products before attention, and half of that."""
    gaps: float
    """In which the GPU waits between kernels, at the least."""
    host: float
    """That the host takes to hand it over."""

    def waiting(self, busy: float) -> float:
        """Seconds in which the GPU waits, of which it has something to do in `busy` others."""
        return max(self.gaps, self.host - busy)


@cache
def layer_time(plan: LayerPlan, policy: RecomputePolicy, rates: Rates, rank: int | None = None) -> LayerTime:
    """The same for every layout that has such a layer.

    Args:
        rank: whose; None: of the one that has most to do.
    """
    work, moved, links, segment = layer_work(plan, rank), layer_traffic(plan), rates.links, plan.segment
    forward, backward = (rates.seconds(one, segment) for one in (work.forward, work.backward))
    backward["attention"] /= BACKWARD_RATE
    again = sum(rates.seconds(work.again[policy], segment).values())
    # A streamed sequence's chunks run forward twice, but for the last; the first time not all of each.
    twice = 2.0 - 1.0 / plan.chunks
    ahead, entry = sum(forward.values()), rates.seconds(work.entry, segment)["products"]
    left = share_left(plan)
    first = min(1.0, left + 1 / plan.arch.layers) * entry + left * (ahead - entry)
    parts = {name: forward[name] + backward[name] for name in forward}
    parts["pointwise"] += rates.seconds(work.moved[policy], segment)["pointwise"]
    parts["recompute"] = again + (twice - 1.0) * first
    whole = policy is RecomputePolicy.FULL
    tiled = policy in (RecomputePolicy.FULL, RecomputePolicy.GATE_UP)
    exchanged = twice * moved.tensor_forward + moved.tensor_backward
    exchanged += (moved.tensor_again if whole else 0.0) + (moved.tensor_tiled if tiled else 0.0)
    halo = links.seconds(moved.halo * (1 + whole + twice), plan.cp, plan.tp)
    parts["communication"] = links.seconds(exchanged, plan.tp, 1) + halo
    passes = plan.chunks * (1 + twice) / 2
    return LayerTime(
        parts=parts,
        forward=ahead,
        backward=sum(backward.values()) + again,
        before_halo=entry + forward["attention"] / 2,
        gaps=rates.fitted.layer_s * passes,
        host=rates.fitted.host_op_s * operations(plan, policy) * passes,
    )


def loss_time(plan: LayerPlan, rates: Rates) -> dict[str, float]:
    """Seconds of the output matrix, its loss and the embedding, of one micro-batch."""
    return rates.seconds(loss_work(plan), plan.segment)
