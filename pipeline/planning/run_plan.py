"""What a run makes of a checkpoint and of its ranks, refused before anything slow is imported. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from parallel.errors import ConfigError
from parallel.world.grid import check_interleaving, check_model_fits, plan_batch, plan_grid, plan_stages
from parallel.world.rank_env import RankEnv
from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.planning.arch import LlamaArch, read_arch
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


def check_before_spending(config: RunConfig, env: RankEnv) -> tuple[LlamaArch, RopePlan]:
    """Everything that can be refused before torch allocates: grid, batch, files, architecture, RoPE.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each.
    """
    parallel = config.parallel
    grid = plan_grid(env.world_size, parallel.tp, parallel.cp, parallel.pp)
    batch = plan_batch(config.train.global_batch, config.train.micro_batch, grid.dp)
    check_interleaving(parallel.pp, parallel.virtual, batch.accumulation)
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: {folder} is not a folder; point it at a Hugging Face checkpoint (tools.import_hf makes "
            "one from a GGUF file)."
        )
    if not Path(config.data.path).exists():
        raise ConfigError(f"data.path: {config.data.path} does not exist; point it at text or prepared shards.")
    if config.eval.path is not None and not Path(config.eval.path).exists():
        raise ConfigError(f"eval.path: {config.eval.path} does not exist; point it at text or prepared shards.")
    arch, rope = plan_model(config.model, read_arch(folder))
    check_model_fits(grid, arch.heads, arch.kv_heads, arch.ffn)
    plan_stages(arch.layers, parallel.pp, parallel.virtual)
    return arch, rope
