"""How rotary positions are stretched to a context, and the config.json fields that make transformers compute the same.

Linear position interpolation (arXiv 2306.15595), NTK-aware and adjusted bases (ABF: 2309.16039), YaRN (2309.00071) and
Llama 3.1's scheme. `ntk` and `abf` only change the base, so their plan, and what is exported, is plain RoPE (`none`)
with another theta. `model.layers.rotary` computes with the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from parallel.errors import ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.planning.arch import LlamaArch

SHORTEST_PRETRAINING = 2048
"""No Llama-class model was pretrained on less; a smaller `max_position_embeddings / factor` means the checkpoint keeps
the original context in max_position_embeddings (LongLoRA's and Vicuna's releases do), so nothing is guessed from it."""


@dataclass(frozen=True)
class RopePlan:
    """How positions turn into angles, in the checkpoint's terms."""

    type: str
    """none | linear | yarn | llama3."""
    theta: float
    """RoPE base, dimensionless."""
    factor: float
    """Stretch over the original context; 1 for `none`."""
    original_context: int
    """Context before stretching, tokens; for `none` the context the base itself serves."""
    attention_factor: float = 1.0
    """Multiplier of cos and sin (YaRN's temperature)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this are left alone."""
    beta_fast: float = 32.0
    """yarn: rotations over the original context above which a pair is left alone."""
    beta_slow: float = 1.0
    """yarn: rotations below which a pair is stretched in full."""
    truncate: bool = True
    """yarn: round the ramp's ends outwards to whole pairs."""


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """NTK-aware base: theta * factor^(D / (D - 2)), so that the slowest pair is stretched by exactly `factor`."""
    return float(theta * factor ** (head_dim / (head_dim - 2)))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature on cos and sin, 0.1 m ln(s) + 1 (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _own_plan(arch: LlamaArch, context: int, told: int | None = None) -> RopePlan:
    """The checkpoint's RoPE as it stands; `told` is the original context as the user knows it (linear only)."""
    scaling = arch.rope_scaling
    longest = max(context, arch.max_positions)
    if scaling is None:
        return RopePlan("none", arch.rope_theta, 1.0, longest)
    factor, kind = float(scaling["factor"]), str(scaling["rope_type"])
    original = scaling.get("original_max_position_embeddings") or max(1, round(arch.max_positions / factor))
    if kind == "linear":
        return RopePlan("linear", arch.rope_theta, factor, told or original)
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        return RopePlan("llama3", arch.rope_theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    temperature = scaling.get("attention_factor")
    if temperature is None and mscale and mscale_all:
        temperature = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all)
    return RopePlan(
        "yarn",
        arch.rope_theta,
        factor,
        original,
        attention_factor=yarn_attention_factor(factor) if temperature is None else temperature,
        beta_fast=scaling.get("beta_fast", 32.0),
        beta_slow=scaling.get("beta_slow", 1.0),
        truncate=scaling.get("truncate", True),
    )


def _original_context(arch: LlamaArch, settings: RopeSettings) -> int:
    """Context before any scaling, tokens."""
    if settings.original_context is not None:
        return settings.original_context
    scaling = arch.rope_scaling
    if scaling is None:
        return arch.max_positions
    if "original_max_position_embeddings" in scaling:
        return int(scaling["original_max_position_embeddings"])
    original = round(arch.max_positions / scaling["factor"])
    if original < SHORTEST_PRETRAINING:
        raise ConfigError(
            f"model.rope.original_context: the checkpoint is already scaled by {scaling['factor']:g} with "
            f"max_position_embeddings {arch.max_positions}, so its original context is unclear; set it, e.g. 4096 for "
            "Llama-2."
        )
    return original


def served_context(arch: LlamaArch, settings: RopeSettings) -> int:
    """Longest context the checkpoint's own RoPE serves, tokens."""
    scaling = arch.rope_scaling
    if scaling is None or scaling["rope_type"] != "linear":
        return arch.max_positions
    original = settings.original_context or scaling.get("original_max_position_embeddings")
    # Releases that keep the original context in max_position_embeddings still serve factor times it.
    return arch.max_positions if original is None else max(arch.max_positions, round(original * scaling["factor"]))


def _check_window(arch: LlamaArch, context: int) -> None:
    if arch.sliding_window is not None and context > arch.sliding_window:
        raise ConfigError(
            f"model.context: {context} exceeds the checkpoint's sliding_window {arch.sliding_window}, and "
            "sliding-window attention is not supported; use a Mistral release without it (v0.2 or later)."
        )


def _auto(arch: LlamaArch, settings: RopeSettings, context: int) -> RopePlan:
    served = served_context(arch, settings)
    if context <= served:
        if settings.factor is not None:
            raise ConfigError(
                f"model.rope.factor: context {context} fits the checkpoint's own {served}, so type auto does not "
                "stretch; remove factor, or set type: linear."
            )
        return _own_plan(arch, context, settings.original_context)
    if arch.rope_scaling is not None and arch.rope_scaling["rope_type"] != "linear":
        kind = arch.rope_scaling["rope_type"]
        raise ConfigError(
            f"model.rope.type: the checkpoint uses {kind} scaling up to {served} tokens and context is {context}, so "
            f"auto cannot choose; set it, e.g. type: {kind} with a factor, or type: abf with a theta."
        )
    return _forced("linear", arch, settings, context)


def _forced(kind: str, arch: LlamaArch, settings: RopeSettings, context: int) -> RopePlan:
    theta, longest = arch.rope_theta, max(context, arch.max_positions)
    if kind == "none":
        return RopePlan("none", theta, 1.0, longest)
    if kind in ("abf", "ntk") and settings.theta is not None:
        return RopePlan("none", settings.theta, 1.0, longest)
    original = _original_context(arch, settings)
    factor = max(1.0, context / original) if settings.factor is None else float(settings.factor)
    if settings.factor is not None and kind != "llama3" and factor * original < context:
        raise ConfigError(
            f"model.rope.factor: {factor:g} times the original context {original} is {round(factor * original)}, less "
            f"than model.context {context}; use at least {context / original:g} or remove it."
        )
    if factor == 1.0:
        return RopePlan("none", theta, 1.0, longest)
    if kind == "ntk":
        if arch.head_dim < 4:
            raise ConfigError(
                f"model.rope.type: ntk needs a head_dim of at least 4, the checkpoint has {arch.head_dim}."
            )
        return RopePlan("none", ntk_theta(theta, factor, arch.head_dim), 1.0, longest)
    if kind == "linear":
        return RopePlan("linear", theta, factor, original)
    own = _own_plan(arch, context)
    if kind == "yarn":
        betas = (own.beta_fast, own.beta_slow, own.truncate) if own.type == "yarn" else (32.0, 1.0, True)
        fast, slow, truncate = betas
        temperature = yarn_attention_factor(factor)
        return RopePlan("yarn", theta, factor, original, temperature, beta_fast=fast, beta_slow=slow, truncate=truncate)
    low, high = (own.low_freq_factor, own.high_freq_factor) if own.type == "llama3" else (1.0, 4.0)
    return RopePlan("llama3", theta, factor, original, low_freq_factor=low, high_freq_factor=high)


def plan_rope(arch: LlamaArch, settings: RopeSettings, context: int) -> RopePlan:
    """Decide how positions are stretched so that `context` tokens fit (see `RopeSettings`).

    A forced type replaces the checkpoint's own scaling and counts its factor from the original context.

    Raises:
        ConfigError: the settings contradict each other or the checkpoint.
    """
    _check_window(arch, context)
    if settings.type == "auto":
        return _auto(arch, settings, context)
    return _forced(settings.type, arch, settings, context)


ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
"""Every top-level key of config.json that `hf_rope_fields` may write; remove them all before writing its fields."""


def hf_rope_fields(plan: RopePlan, arch: LlamaArch, context: int) -> dict[str, Any]:
    """The config.json fields that make transformers 4 and 5 compute this plan's angles.

    transformers 4 reads `rope_theta` and `rope_scaling`; 5 prefers `rope_scaling` where present and fills in
    `rope_theta`, and otherwise reads `rope_parameters`. All are written and agree. `original_max_position_embeddings`
    stands at the top level for linear scaling only: both versions ignore it there, and `read_arch` uses it to extend
    once more.
    """
    scaling: dict[str, Any] = {"rope_type": plan.type, "factor": plan.factor}
    if plan.type == "none":
        scaling = {"rope_type": "default"}
    elif plan.type != "linear":
        scaling["original_max_position_embeddings"] = plan.original_context
    if plan.type == "llama3":
        scaling |= {"low_freq_factor": plan.low_freq_factor, "high_freq_factor": plan.high_freq_factor}
    if plan.type == "yarn":
        scaling |= {"attention_factor": plan.attention_factor, "beta_fast": plan.beta_fast, "beta_slow": plan.beta_slow}
        if not plan.truncate:
            scaling["truncate"] = False
    fields: dict[str, Any] = {
        # A context shorter than what the checkpoint serves must not shrink what it declares.
        "max_position_embeddings": max(context, arch.max_positions),
        "rope_theta": plan.theta,
        "rope_scaling": None if plan.type == "none" else scaling,
        "rope_parameters": {**scaling, "rope_theta": plan.theta},
    }
    if plan.type == "linear":
        fields["original_max_position_embeddings"] = plan.original_context
    return fields
