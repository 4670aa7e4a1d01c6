"""What each layer keeps for its backward pass and what it computes again: decided here, before torch is imported.

The memory formula counts by these policies and the layers follow them; `RunPlan` alone reads `train.recompute`.
"""

from __future__ import annotations

from enum import StrEnum


class RecomputePolicy(StrEnum):
    """What one layer keeps."""

    FULL = "full"
    """Its input alone: the whole layer runs again in the backward pass, but for what leaves it."""
    NONE = "none"
    """Every product's output. Norms' and SwiGLU's outputs are made again where nothing else needs them."""


def plan_recompute(setting: str, layers: int) -> tuple[RecomputePolicy, ...]:
    """The policy of every layer of the model.

    Args:
        setting: train.recompute, one of `config.sections.RECOMPUTE`.
        layers: of the whole model.
    """
    return (RecomputePolicy(setting),) * layers
