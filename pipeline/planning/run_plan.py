"""What a run makes of a checkpoint: vocabulary and rotary positions, refused before anything slow is imported."""

from __future__ import annotations

from dataclasses import replace

from parallel.errors import ConfigError
from pipeline.config.sections import ModelConfig
from pipeline.planning.arch import LlamaArch
from pipeline.planning.rope import RopePlan, described, plan_rope, replaces, served_context


def check_growth(stored: int, wanted: int, where: str) -> None:
    """Refuse to drop rows.

    Raises:
        ConfigError: `wanted` rows are fewer than the `stored` ones.
    """
    if wanted < stored:
        raise ConfigError(
            f"{where}: {wanted} rows are fewer than the checkpoint's {stored}; tokens can be added, not dropped."
        )


def refuse_biases(arch: LlamaArch) -> None:
    """Raise ConfigError for a checkpoint with biases that megatron's layers cannot place."""
    if arch.o_bias or arch.mlp_bias:
        raise ConfigError(
            "model.path: this checkpoint has biases on o_proj or the MLP, which is not supported; "
            "use a Llama-class checkpoint without them."
        )


def plan_model(settings: ModelConfig, stored: LlamaArch) -> tuple[LlamaArch, RopePlan]:
    """The model that is trained, with its added rows, and its rotary positions.

    Args:
        stored: sizes the checkpoint at `settings.path` declares.

    Raises:
        ConfigError: the settings do not fit the checkpoint, or it is not supported.
    """
    arch = stored
    if settings.vocab is not None:
        check_growth(stored.vocab, settings.vocab, "model.vocab")
        arch = replace(stored, vocab=settings.vocab)
    refuse_biases(arch)
    rope, served = settings.rope, served_context(arch, settings.rope.original_context)
    own_linear = arch.rope_scaling is not None and arch.rope_scaling["rope_type"] == "linear"
    # Not in plan_rope: checkpoints of earlier releases, which took it, must still export.
    if rope.type == "auto" and rope.original_context is not None and settings.context <= served and not own_linear:
        raise ConfigError(
            f"model.rope.original_context: context {settings.context} fits the checkpoint's own {served}, so type auto "
            "does not stretch; remove original_context, or set type: linear."
        )
    plan = plan_rope(arch, rope, settings.context)
    if settings.context <= served and not rope.replace and replaces(arch, plan):
        raise ConfigError(
            f"model.rope.type: the checkpoint's own {described(arch)} reaches {served} tokens, and type {rope.type} "
            f"would replace it though context is {settings.context}; use type: auto, which keeps it, or set "
            "model.rope.replace: true if you mean to."
        )
    return arch, plan
