"""What a rank and a machine must hold, by kind: `planning.memory` told apart, with what no tensor shows beside it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.activations import LOGITS
from pipeline.planning.base_form import layer_bytes
from pipeline.planning.memory import CUDA_CONTEXT, GIB, PROCESS
from pipeline.planning.run_plan import RunPlan

CONTEXT = GIB // 2
"""CUDA's context and the kernels loaded, bytes."""
NCCL = GIB // 8
"""Buffers of one communicator, bytes."""
RESIDENT = 3 * GIB // 2
"""What a process really has of `planning.memory.PROCESS`, which leaves room for loading: docs/RESULTS.md."""
FRAGMENTS = 0.013
"""Reserved and not allocated, of what is allocated: docs/RESULTS.md, expandable segments."""
KINDS = (
    "weights",
    "adapters",
    "optimizer",
    "gradients",
    "kept activations",
    "working set",
    "logits",
    "gather and halo buffers",
    "NCCL",
    "CUDA context",
    "fragmentation and reserve",
)
"""Of a GPU's memory, in the order they are shown."""
HELD = {
    "frozen norms": "weights",
    "frozen weights": "weights",
    "frozen weights, shard": "weights",
    "frozen weights, again in FP8": "weights",
    "trained weights": "weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "kept activations",
    "layer inputs": "kept activations",
    "gathered weights": "gather and halo buffers",
    "halos' gradients": "gather and halo buffers",
    "a halo fetched ahead": "gather and halo buffers",
}
"""Kind of each entry of `MemoryEstimate.gpu`; others are a layer's or the loss's work."""
PINNED = ("frozen weights, shard", "gate and up", "parked halos", "evaluation's keys and values")
"""Of `MemoryEstimate.host`, what is page-locked."""
UNSEEN = ("NCCL", "CUDA context", "fragmentation and reserve")
"""Kinds that are none of PyTorch's allocations."""


@dataclass(frozen=True)
class Footprint:
    """Bytes."""

    gpu: dict[str, int]
    """One GPU's peak, every one of KINDS."""
    host: dict[str, int]
    """One process's host memory."""
    machine: int
    """Host memory of one machine, all its processes and what saving gathers."""
    pinned: int
    """Of a process's host memory, what is page-locked."""

    @property
    def gpu_total(self) -> int:
        """Of one GPU."""
        return sum(self.gpu.values())

    @property
    def resident(self) -> int:
        """What a process is seen to hold of host memory while it trains."""
        return sum(self.host.values()) - PROCESS + RESIDENT

    @property
    def allocated(self) -> int:
        """What PyTorch calls the peak of allocated memory."""
        return sum(size for kind, size in self.gpu.items() if kind not in UNSEEN)

    @property
    def reserved(self) -> int:
        """What PyTorch calls the peak of reserved memory."""
        return int(self.allocated * (1 + FRAGMENTS))


def by_stage(plan: RunPlan, gpus_a_node: int) -> list[dict[str, int]]:
    """Each pipeline stage's memory by kind; its ranks are alike.

    `footprint` is the first stage's, which has the embedding and most micro-batches under way. A later stage keeps
    fewer, and the last has the output matrix instead.
    """
    first, grid, width = footprint(plan, gpus_a_node).gpu, plan.grid, plan.config.model.element_bytes
    counts, found = plan.counts, []
    for stage in range(grid.pp):
        layers = sum(len(chunk) for chunk in plan.chunks[stage :: grid.pp])
        share = dict(first)
        if grid.pp > 1:
            most = -(-plan.arch.layers // grid.pp)
            share["kept activations"] = first["kept activations"] * (grid.pp - stage) * layers // (grid.pp * most)
            ends = counts.embedding * (stage == 0) + counts.head * (stage == grid.pp - 1)
            missing = (most - layers) * layer_bytes(plan.config.model.base, plan.arch, grid.tp, width)
            both = (counts.embedding + counts.head - ends) * width // grid.tp
            share["weights"] = max(0, first["weights"] - both - missing)
        found.append(share)
    return found


def footprint(plan: RunPlan, gpus_a_node: int) -> Footprint:
    """What `plan` takes.

    Args:
        gpus_a_node: ranks that share a machine, at most.
    """
    estimate, grid, width = plan.memory(), plan.grid, plan.config.model.element_bytes
    gpu = dict.fromkeys(KINDS, 0)
    for part, size in estimate.gpu.items():
        if part == "context":
            continue
        gpu[HELD.get(part, "working set" if size > LOGITS else "logits")] += size
    adapters = plan.counts.adapters // grid.tp * width
    gpu["adapters"] += adapters
    gpu["weights"] -= adapters
    allocated = sum(gpu.values())
    groups = sum(size > 1 for size in (grid.tp, grid.cp, grid.dp * grid.cp, grid.pp, grid.world_size))
    gpu["CUDA context"], gpu["NCCL"] = CONTEXT, NCCL * groups
    left = CUDA_CONTEXT - gpu["CUDA context"] - gpu["NCCL"]
    gpu["fragmentation and reserve"] = max(left, int(FRAGMENTS * allocated))
    processes = min(gpus_a_node, grid.world_size)
    pinned = sum(estimate.host.get(part, 0) for part in PINNED)
    return Footprint(gpu, dict(estimate.host), estimate.host_total(processes), pinned)
