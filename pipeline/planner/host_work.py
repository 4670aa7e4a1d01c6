"""What the host has to hand to PyTorch for a layer, forward and backward: where a GPU is done sooner, it waits.

Counted by running a small model on a CPU, Triton's kernels left out, and counting what is dispatched
(tests/support/dispatched.py; tests/numerics/test_dispatched.py counts again). Sizes change nothing, but for tiles.
"""

from __future__ import annotations

from pipeline.planner.work import mlp_tiles, product_tiles
from pipeline.planning.base_form import PRODUCTS
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import RunPlan

FULL, GATE_UP, HOST, FP8, POINTWISE, NONE = RecomputePolicy
OPERATIONS: dict[tuple[str, bool], dict[RecomputePolicy, tuple[int, int]]] = {
    ("bf16", False): {NONE: (343, 0), POINTWISE: (372, 0), GATE_UP: (379, 39), FULL: (527, 39)},
    ("bf16", True): {NONE: (290, 88), POINTWISE: (302, 88), GATE_UP: (300, 96), FULL: (410, 119)},
    ("fp8", False): {NONE: (392, 0), POINTWISE: (421, 0), GATE_UP: (445, 59), FULL: (601, 59)},
    ("fp8", True): {NONE: (354, 156), POINTWISE: (366, 156), GATE_UP: (366, 150), FULL: (484, 189)},
    ("nf4", False): {NONE: (378, 0), POINTWISE: (407, 0), GATE_UP: (415, 39), FULL: (571, 39)},
    ("nf4", True): {NONE: (330, 88), POINTWISE: (342, 88), GATE_UP: (340, 96), FULL: (460, 119)},
}
"""By base and whether tensors are cut: of each policy with products whole, and for every further tile. What keeps gate
and up elsewhere is counted as POINTWISE."""


def tiles(plan: RunPlan, policy: RecomputePolicy) -> float:
    """Tiles of a layer's products, the mean over them."""
    alone = {parts: product_tiles(plan, parts) for parts in PRODUCTS}
    if policy in (FULL, GATE_UP):
        alone |= dict.fromkeys(PRODUCTS[2:], mlp_tiles(plan))
    if plan.grid.tp == 1:
        return alone[PRODUCTS[2]]  # of attention's products nothing is cut
    return sum(alone.values()) / len(alone)


def operations(plan: RunPlan, policy: RecomputePolicy) -> float:
    """Operations of PyTorch in one layer's forward and backward of a micro-batch, or of a chunk of it."""
    counted = OPERATIONS[plan.config.model.base, plan.grid.tp > 1]
    whole, tile = counted.get(policy, counted[POINTWISE])
    return whole + tile * (tiles(plan, policy) - 1)
