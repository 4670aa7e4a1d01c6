"""Published shapes that stand in for checkpoints which are not on this machine. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.planner.models import find_model
from pipeline.planning.arch import LlamaArch

SIZES = ("70b", "13b", "7b")
KNOWN = (*SIZES, "8b")


def llama2(size: str, layers: int | None = None) -> LlamaArch:
    """Llama-2 of one of SIZES, optionally with fewer layers."""
    return _shape(f"llama2-{size}", layers)


def llama3_8b(layers: int | None = None) -> LlamaArch:
    """Llama-3 8B, optionally with fewer layers."""
    return _shape("llama3-8b", layers)


def shape_of(size: str, layers: int | None = None) -> LlamaArch:
    """Of one of KNOWN, whose sizes differ from release to release: 8b is Llama-3's, the others Llama-2's."""
    return llama3_8b(layers) if size == "8b" else llama2(size, layers)


def _shape(name: str, layers: int | None) -> LlamaArch:
    """A published model's, with ids that a small stand-in tokenizer has too."""
    arch = find_model(name).arch
    return replace(arch, layers=layers or arch.layers, bos_id=1, eos_id=2)


def config_json(arch: LlamaArch) -> dict[str, Any]:
    """What such a checkpoint's config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": arch.model_type,
        "hidden_size": arch.hidden,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "vocab_size": arch.vocab,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tied,
        "bos_token_id": arch.bos_id,
        "eos_token_id": arch.eos_id,
    }
