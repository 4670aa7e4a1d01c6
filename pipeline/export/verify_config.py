"""Does an export's config.json, as transformers reads it, describe the model that was trained?

What was trained is known without that file: sizes and constants of the base as the trainer read them, and its RoPE
plan.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from parallel.errors import CheckpointError
from pipeline.export.trained_model import TrainedModel
from pipeline.model.layers.rotary import inverse_frequencies

ROUNDING = 1e-6
"""Relative difference of frequencies that is no other setting: both sides compute them in fp32, operation by operation
alike."""
DIALECTS: tuple[tuple[str, ...], ...] = ((), ("rope_parameters",), ("rope_scaling", "rope_theta"))
"""Keys left out: transformers 4 looks at `rope_scaling` and `rope_theta`, 5 at `rope_parameters` too, and each alone
must say the same."""


def read_hf_config(folder: Path) -> PretrainedConfig:
    """config.json of `folder` as transformers reads it.

    Raises:
        CheckpointError: it does not.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' own validation raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder / 'config.json'}: transformers does not read it ({reason}).") from None


def _expected(model: TrainedModel) -> dict[str, Any]:
    """Values that `model` computes with, by transformers' names."""
    arch = model.arch
    wanted: dict[str, Any] = {
        "model_type": arch.model_type,
        "hidden_size": arch.hidden,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied,
        "max_position_embeddings": max(model.context, arch.max_positions),
    }
    if arch.model_type == "llama":
        wanted |= {"attention_bias": arch.attention_bias, "mlp_bias": arch.mlp_bias}
    if arch.model_type == "qwen3":
        wanted["attention_bias"] = arch.attention_bias
    if arch.model_type == "mistral" or arch.sliding_window is not None:
        wanted["sliding_window"] = arch.sliding_window
    return wanted


def check_rotary(rotary: Any, model: TrainedModel, where: str) -> None:
    """Compare a rotary embedding of transformers' (`inv_freq`, `attention_scaling`) with the plan trained with.

    Raises:
        CheckpointError: it turns by other angles.
    """
    plan = model.rope
    trained = f"trained with {plan.type}, factor {plan.factor:g}, theta {plan.theta:g}"
    kind = "default" if plan.type == "none" else plan.type
    if rotary.rope_type != kind:
        raise CheckpointError(f"{where}: its RoPE is of type {rotary.rope_type!r}, and the model was {trained}.")
    found, wanted = rotary.inv_freq.float().cpu(), inverse_frequencies(plan, model.arch.head_dim)
    if found.shape != wanted.shape:
        raise CheckpointError(f"{where}: its RoPE turns {len(found)} pairs of a head, and the model {len(wanted)}.")
    ratio = found / wanted
    # Not `> ROUNDING`: a NaN must fail.
    same = (ratio - 1).abs() <= ROUNDING
    if not same.all():
        pair = int((~same).nonzero()[0])
        raise CheckpointError(
            f"{where}: its RoPE turns pair {pair} of a head {ratio[pair]:.6g} times as fast as in training (the model "
            f"was {trained})."
        )
    if not abs(rotary.attention_scaling / plan.attention_factor - 1) <= ROUNDING:
        raise CheckpointError(
            f"{where}: its RoPE scales cos and sin by {rotary.attention_scaling:g}, and training did by "
            f"{plan.attention_factor:g}."
        )


def check_config(model: TrainedModel, folder: Path) -> None:
    """Compare every size and constant, and RoPE in every dialect, of `folder`/config.json with what was trained.

    Raises:
        CheckpointError: the first that differs, named.
    """
    path, config = folder / "config.json", read_hf_config(folder)
    for key, want in _expected(model).items():
        found = getattr(config, key, None)
        if key == "head_dim" and found is None:
            found = config.hidden_size // config.num_attention_heads
        if found != want:
            raise CheckpointError(f"{path}: {key} is {found!r}, and the model was trained with {want!r}.")
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{path}: hidden_act is {activation!r}, and the model was trained with 'silu'.")
    values = json.loads(path.read_text(encoding="utf-8"))
    for dropped in DIALECTS:
        kept = {key: value for key, value in values.items() if key not in (*dropped, "model_type")}
        with torch.device("meta"):
            # For its class of rotary embedding alone: nothing is allocated.
            network = AutoModelForCausalLM.from_config(config)
        left = f" without {' and '.join(dropped)}" if dropped else ""
        try:
            rotary = type(network.model.rotary_emb)(AutoConfig.for_model(model.arch.model_type, **kept))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}{left}: transformers does not read its RoPE ({reason}).") from None
        check_rotary(rotary, model, f"{path}{left}")
