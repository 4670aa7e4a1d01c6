"""Published shapes that stand in for checkpoints which are not on this machine. No torch."""

from __future__ import annotations

from typing import Any

from pipeline.planning.arch import LlamaArch

# hidden, FFN, layers, query heads, KV heads
_LLAMA3_8B = (4096, 14336, 32, 32, 8)
_LLAMA2 = {
    "70b": (8192, 28672, 80, 64, 8),
    "13b": (5120, 13824, 40, 40, 40),
    "7b": (4096, 11008, 32, 32, 32),
}
SIZES = tuple(_LLAMA2)
KNOWN = (*SIZES, "8b")


def llama2(size: str, layers: int | None = None) -> LlamaArch:
    """Llama-2 of one of SIZES, optionally with fewer layers."""
    return _llama(_LLAMA2[size], layers, 32000, 10000.0, 4096)


def llama3_8b(layers: int | None = None) -> LlamaArch:
    """Llama-3 8B, optionally with fewer layers."""
    return _llama(_LLAMA3_8B, layers, 128256, 500000.0, 8192)


def shape_of(size: str, layers: int | None = None) -> LlamaArch:
    """Of one of KNOWN, whose sizes differ from release to release: 8b is Llama-3's, the others Llama-2's."""
    return llama3_8b(layers) if size == "8b" else llama2(size, layers)


def _llama(
    sizes: tuple[int, int, int, int, int], layers: int | None, vocab: int, theta: float, context: int
) -> LlamaArch:
    hidden, ffn, depth, heads, kv_heads = sizes
    return LlamaArch(
        model_type="llama",
        hidden=hidden,
        ffn=ffn,
        layers=layers or depth,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        vocab=vocab,
        norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=None,
        max_positions=context,
        tied=False,
        attention_bias=False,
        o_bias=False,
        mlp_bias=False,
        bos_id=1,
        eos_id=2,
    )


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
