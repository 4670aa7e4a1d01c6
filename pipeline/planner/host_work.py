"""What the host has to hand to PyTorch for a layer, forward and backward: where a GPU is done sooner, it waits.

Counted by running a small model on a CPU, Triton's kernels left out, and counting what is dispatched
(tests/support/dispatched.py; tests/numerics/test_dispatched.py counts again). Sizes change nothing, but for tiles.
"""

from __future__ import annotations

from functools import cache

from pipeline.planner.work import mlp_tiles, product_tiles
from pipeline.planning.base_form import PRODUCTS
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.recompute import RecomputePolicy

FULL, GATE_UP, HOST, FP8, POINTWISE, NONE = RecomputePolicy
OPERATIONS: dict[tuple[str, bool], dict[RecomputePolicy, tuple[int, int]]] = {
    ("bf16", False): {NONE: (332, 0), POINTWISE: (355, 0), GATE_UP: (356, 33), FULL: (494, 33)},
    ("bf16", True): {NONE: (279, 88), POINTWISE: (285, 88), GATE_UP: (277, 90), FULL: (377, 113)},
    ("fp8", False): {NONE: (381, 0), POINTWISE: (404, 0), GATE_UP: (420, 51), FULL: (566, 51)},
    ("fp8", True): {NONE: (339, 160), POINTWISE: (345, 160), GATE_UP: (341, 146), FULL: (448, 186)},
    ("nf4", False): {NONE: (367, 0), POINTWISE: (390, 0), GATE_UP: (392, 33), FULL: (538, 33)},
    ("nf4", True): {NONE: (319, 88), POINTWISE: (325, 88), GATE_UP: (317, 90), FULL: (427, 113)},
}
"""By base and whether tensors are cut: of each policy with products whole, and for every further tile. What keeps gate
and up elsewhere is counted as POINTWISE."""


def tiles(plan: LayerPlan, policy: RecomputePolicy) -> float:
    """Tiles of a layer's products, the mean over them."""
    alone = {parts: product_tiles(plan, parts) for parts in PRODUCTS}
    if policy in (FULL, GATE_UP):
        alone |= dict.fromkeys(PRODUCTS[2:], mlp_tiles(plan))
    if plan.tp == 1:
        return alone[PRODUCTS[2]]  # of attention's products nothing is cut
    return sum(alone.values()) / len(alone)


@cache
def operations(plan: LayerPlan, policy: RecomputePolicy) -> float:
    """Operations of PyTorch in one layer's forward and backward of a micro-batch, or of a chunk of it."""
    counted = OPERATIONS[plan.base, plan.tp > 1]
    whole, tile = counted.get(policy, counted[POINTWISE])
    return whole + tile * (tiles(plan, policy) - 1)
