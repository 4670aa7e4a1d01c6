"""What each layer keeps for its backward pass and what it computes again: decided here, before torch is imported.

The memory formula counts by these policies and the layers follow them; `RunPlan` alone reads `train.recompute`. The
word `auto` is resolved by `planning.fill_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import groupby


class RecomputePolicy(StrEnum):
    """What one layer keeps, from least to most on the GPU.

    Gradients are the same whatever is kept, but for FP8's, which are made with rounded gate and up.
    """

    FULL = "full"
    """Its input alone: the whole layer runs again in the backward pass, but for what leaves it."""
    GATE_UP = "gate_up"
    """As POINTWISE, without gate and up, the widest outputs of all: they are made again, tile by tile."""
    HOST = "host"
    """As POINTWISE, gate and up in pinned host memory, copied there and back beside the computation."""
    FP8 = "fp8"
    """As POINTWISE, gate and up in e4m3 with a scale for each token's gate and up; see `layers.fp8` for the error."""
    POINTWISE = "pointwise"
    """Every product's output, and attention's. Outputs of norms and of SwiGLU, and attention's by tokens, are made
    again where an adapter's gradient wants them."""
    NONE = "none"
    """Those as well: nothing is computed again, but for what a gradient's kernel makes of its inputs (silu, attention's
    probabilities)."""


KEPT_IN = {"gpu": RecomputePolicy.POINTWISE, "fp8": RecomputePolicy.FP8, "host": RecomputePolicy.HOST}
"""The policy that keeps gate and up where train.gate_up says."""


def plan_recompute(setting: str, layers: int, gate_up: str = "gpu") -> tuple[RecomputePolicy, ...]:
    """The policy of every layer of the model, where one setting names it.

    Args:
        setting: train.recompute, one of `config.sections.POLICIES`.
        layers: of the whole model.
        gate_up: train.gate_up.
    """
    return (policy_of(setting, gate_up),) * layers


def policy_of(setting: str, gate_up: str = "gpu") -> RecomputePolicy:
    """The policy that one word of train.recompute names, which is not auto."""
    policy = RecomputePolicy(setting)
    return KEPT_IN[gate_up] if policy is RecomputePolicy.POINTWISE else policy


def tally(policies: Sequence[RecomputePolicy]) -> dict[RecomputePolicy, int]:
    """How many layers have each policy, in the order in which they first come."""
    counts: dict[RecomputePolicy, int] = {}
    for policy, run in groupby(policies):
        counts[policy] = counts.get(policy, 0) + len(list(run))
    return counts
