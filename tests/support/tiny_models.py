"""Tiny random Hugging Face checkpoints of every supported architecture, written with safetensors alone: fast and
seeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.tensors import hf_tensor_shapes

VOCAB = 128
_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama2": {},
    "llama3": {
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE,
        "max_position_embeddings": 128,
    },
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 88},
    # 9 query and 3 KV heads, as the real one: the S² split of the heads falls inside a KV group.
    "smollm2": {
        "hidden_size": 144,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 24,
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
    # Llama-3.2's small ones: tied, a factor of 32, a head width told apart.
    "llama32": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0},
        "max_position_embeddings": 128,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 64,
        "max_window_layers": 2,
    },
    # Norms of heads, whose width is not the hidden one's share.
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
    },
    "biased": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "codellama": {"rope_theta": 1000000.0, "hidden_size": 48, "vocab_size": 144},
}
"""What each kind changes of the common config; head widths stay even and small."""


def tiny_config(kind: str, **over: Any) -> dict[str, Any]:
    """config.json of a kind, with keys replaced; a value of `...` removes its key."""
    config = {**_COMMON, **KINDS[kind], **over}
    return {key: value for key, value in config.items() if value is not ...}


def random_weights(arch: LlamaArch, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Hugging Face name -> tensor, scaled so that activations stay near one and norms are not all ones."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in hf_tensor_shapes(arch).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            weights[name] = (1 + 0.1 * values).to(dtype)
        elif name.endswith(".bias"):
            weights[name] = (0.1 * values).to(dtype)
        else:
            weights[name] = (values * shape[-1] ** -0.5 * (shape[-1] ** 0.5 if "embed" in name else 1)).to(dtype)
    return weights


def make_tiny(
    folder: Path,
    kind: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    **over: Any,
) -> Path:
    """Write a random checkpoint of `kind` into `folder` and return it.

    Args:
        tokenizer: also write a byte-level `tokenizer.json` (one token a byte below VOCAB - 3, after <unk> <s> </s>).
        over: config.json keys to replace; `...` removes one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(kind, **over), indent=2))
    save_file(random_weights(read_arch(folder), seed, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, size: int = 0) -> None:
    """A fast tokenizer of single ASCII characters that fits any tiny vocabulary; filled up to `size` tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for code in [10, *range(32, 127)]:
        vocab[chr(code)] = len(vocab)
    while len(vocab) < size:
        vocab[chr(0x4E00 + len(vocab))] = len(vocab)
    special = [
        {"id": number, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for text, number in list(vocab.items())[:3]
    ]
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
