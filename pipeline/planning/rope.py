"""How rotary positions are stretched to a context, and the config.json fields that make transformers compute the same.

Linear position interpolation (arXiv 2306.15595), NTK-aware and adjusted bases (ABF: 2309.16039), YaRN (2309.00071) and
Llama 3.1's scheme. `ntk` and `abf` only change the base, so their plan, and what is exported, is plain RoPE (`none`)
with another theta. `model.layers.rotary` computes with the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from parallel.errors import ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.planning.arch import LlamaArch

SHORTEST_PRETRAINING = 2048
"""No Llama-class model was pretrained on less: where `max_position_embeddings / factor` of linear scaling is smaller,
max_position_embeddings can only be the original context (LongLoRA's and Vicuna's releases keep it there, as
transformers' documentation asks for). Otherwise it may as well be the stretched one (DeepSeek-Coder's), so that nothing
is guessed from it."""


@dataclass(frozen=True)
class RopePlan:
    """How positions turn into angles, in the checkpoint's terms."""

    type: str
    """none | linear | yarn | llama3."""
    theta: float
    """RoPE base, dimensionless."""
    factor: float
    """Stretch over the original context; 1 for `none`."""
    original_context: int | None
    """Context before stretching, tokens; for `none` the context the base itself serves. None: linear scaling of the
    checkpoint's own that does not tell it (no angle depends on it)."""
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


def _temperature(scaling: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature at `factor`, by the checkpoint's rule: its mscale pair, its own constant, or the paper's."""
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    declared, own_factor = scaling.get("attention_factor"), scaling["factor"]
    # A constant that is the paper's at the checkpoint's own factor grows with the factor.
    if declared is not None and (factor == own_factor or declared != yarn_attention_factor(own_factor)):
        return float(declared)
    if declared is None and mscale and mscale_all:
        return yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all)
    return yarn_attention_factor(factor)


def original_context(arch: LlamaArch, known: int | None) -> int | None:
    """Context before any scaling, tokens; None: the checkpoint's linear scaling leaves it open.

    Args:
        known: by the user, whose word counts.
    """
    scaling = arch.rope_scaling
    if known is not None or scaling is None:
        return known or arch.max_positions
    if "original_max_position_embeddings" in scaling:
        return int(scaling["original_max_position_embeddings"])
    return arch.max_positions if arch.max_positions / scaling["factor"] < SHORTEST_PRETRAINING else None


def _known_original(arch: LlamaArch, known: int | None) -> int:
    """`original_context`, refused where it is open."""
    original = original_context(arch, known)
    if original is None and arch.rope_scaling is not None:
        factor, declared = arch.rope_scaling["factor"], arch.max_positions
        raise ConfigError(
            f"model.rope.original_context: the checkpoint is already scaled linearly by {factor:g} and does not say "
            f"whether its max_position_embeddings {declared} is the context before that or after, so it is unclear "
            f"what it serves; set original_context to {declared} if before, or to {round(declared / factor)} if after."
        )
    return original or arch.max_positions


def served_context(arch: LlamaArch, known: int | None = None) -> int:
    """Longest context the checkpoint's own RoPE serves, tokens: factor times the original one where both are known.

    Never less than it declares: Llama-3.1 was trained on more than 8 times its original 8192.

    Args:
        known: original context as the user knows it.
    """
    original = original_context(arch, known)
    if arch.rope_scaling is None or original is None:
        return arch.max_positions
    return max(arch.max_positions, round(original * arch.rope_scaling["factor"]))


def own_plan(arch: LlamaArch, context: int, known: int | None = None) -> RopePlan:
    """The checkpoint's RoPE as it stands.

    Args:
        context: tokens to serve.
        known: original context as the user knows it (linear only: the others compute with what config.json says).
    """
    scaling = arch.rope_scaling
    if scaling is None:
        return RopePlan("none", arch.rope_theta, 1.0, max(context, arch.max_positions))
    factor, kind = float(scaling["factor"]), str(scaling["rope_type"])
    if kind == "linear":
        return RopePlan("linear", arch.rope_theta, factor, original_context(arch, known))
    original = original_context(arch, None)
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        return RopePlan("llama3", arch.rope_theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    return RopePlan(
        "yarn",
        arch.rope_theta,
        factor,
        original,
        attention_factor=_temperature(scaling, factor),
        beta_fast=scaling.get("beta_fast", 32.0),
        beta_slow=scaling.get("beta_slow", 1.0),
        truncate=scaling.get("truncate", True),
    )


def _auto(arch: LlamaArch, settings: RopeSettings, context: int) -> RopePlan:
    served = served_context(arch, settings.original_context)
    if context <= served:
        if settings.factor is not None:
            raise ConfigError(
                f"model.rope.factor: context {context} fits the checkpoint's own {served}, so type auto does not "
                "stretch; remove factor, or set type: linear."
            )
        return own_plan(arch, context, settings.original_context)
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
    original = _known_original(arch, settings.original_context)
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
    own = own_plan(arch, context)
    if kind == "yarn":
        if own.type == "yarn" and arch.rope_scaling is not None:
            temperature = _temperature(arch.rope_scaling, factor)
            return replace(own, factor=factor, original_context=original, attention_factor=temperature)
        return RopePlan("yarn", theta, factor, original, yarn_attention_factor(factor))
    low, high = (own.low_freq_factor, own.high_freq_factor) if own.type == "llama3" else (1.0, 4.0)
    return RopePlan("llama3", theta, factor, original, low_freq_factor=low, high_freq_factor=high)


def plan_rope(arch: LlamaArch, settings: RopeSettings, context: int) -> RopePlan:
    """Decide how positions are stretched so that `context` tokens fit (see `RopeSettings`).

    A forced type replaces the checkpoint's own scaling and counts its factor from the original context.

    Raises:
        ConfigError: the settings contradict each other or the checkpoint.
    """
    if settings.type == "auto":
        return _auto(arch, settings, context)
    return _forced(settings.type, arch, settings, context)


def described(arch: LlamaArch) -> str:
    """The checkpoint's own scaling, in words."""
    scaling = arch.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings")
    return f"{scaling['rope_type']} scaling (factor {scaling['factor']:g}" + (f" of {original})" if original else ")")


def replaces(arch: LlamaArch, plan: RopePlan) -> bool:
    """Whether `plan` computes other angles than scaling of the checkpoint's own."""
    own = own_plan(arch, arch.max_positions)
    return arch.rope_scaling is not None and replace(plan, original_context=None) != replace(own, original_context=None)


def replacement_warning(arch: LlamaArch, plan: RopePlan) -> tuple[str, ...]:
    """A sentence where the model is computed with another RoPE than scaling of its own; else nothing."""
    if not replaces(arch, plan):
        return ()
    new = f"{plan.type}, factor {plan.factor:g}" if plan.type != "none" else f"plain RoPE of theta {plan.theta:g}"
    served = served_context(arch)
    return (f"model.rope: the checkpoint's own {described(arch)}, which serves {served} tokens, is replaced by {new}.",)


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
    stands at the top level for linear scaling only, where it is known: both versions ignore it there, and `read_arch`
    uses it to extend once more.
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
    if plan.type == "linear" and plan.original_context is not None:
        fields["original_max_position_embeddings"] = plan.original_context
    return fields
