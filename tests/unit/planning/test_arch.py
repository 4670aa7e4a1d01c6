"""config.json readers: both dialects, every supported kind, and one clear sentence for everything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from parallel.errors import ConfigError
from pipeline.planning.arch import read_arch
from tests.support.tiny_models import KINDS, tiny_config

QWEN = ("qwen2", "qwen3")


def write(folder: Path, kind: str = "llama2", **over: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(tiny_config(kind, **over)))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(tmp_path: Path, kind: str) -> None:
    config = tiny_config(kind)
    arch = read_arch(write(tmp_path, kind))
    assert (arch.hidden, arch.ffn, arch.layers) == (config["hidden_size"], config["intermediate_size"], 2)
    assert (arch.heads, arch.kv_heads) == (config["num_attention_heads"], config["num_key_value_heads"])
    assert arch.head_dim == config.get("head_dim", arch.hidden // arch.heads)
    assert (arch.tied, arch.rope_theta) == (config["tie_word_embeddings"], config["rope_theta"])
    assert (arch.vocab, arch.bos_id, arch.eos_id) == (config["vocab_size"], 1, 2)
    assert arch.attention_bias is (kind in ("qwen2", "biased")) and arch.qk_norm is (kind == "qwen3")
    assert arch.o_bias is arch.mlp_bias is (kind == "biased")


def test_both_dialects_agree(tmp_path: Path) -> None:
    old = read_arch(write(tmp_path, "llama3"))
    scaling = tiny_config("llama3")["rope_scaling"]
    new = read_arch(
        write(
            tmp_path,
            "llama3",
            rope_scaling=...,
            rope_theta=...,
            rope_parameters={**scaling, "rope_theta": 500000.0},
        )
    )
    assert old == new
    assert old.rope_scaling == scaling


def test_oldest_scaling_key_and_defaults(tmp_path: Path) -> None:
    arch = read_arch(write(tmp_path, rope_scaling={"type": "linear", "factor": 2}, rope_theta=..., bos_token_id=None))
    assert arch.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert (arch.rope_theta, arch.bos_id) == (10000.0, None)
    assert read_arch(write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_theta=...)) == (
        read_arch(write(tmp_path, rope_theta=7.0))
    )


def test_lists_biases_and_missing_keys(tmp_path: Path) -> None:
    arch = read_arch(write(tmp_path, eos_token_id=[5, 6], attention_bias=True, mlp_bias=True, num_key_value_heads=...))
    assert (arch.eos_id, arch.kv_heads) == (5, 4)
    assert arch.attention_bias and arch.o_bias and arch.mlp_bias


@pytest.mark.parametrize(
    ("kind", "over", "words"),
    [
        ("llama2", {"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; use one of Llama"),
        ("llama2", {"architectures": [], "model_type": "gemma"}, "'gemma' is not supported"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "llama2",
            {"quantization_config": {"quant_method": "bitsandbytes"}, "_name_or_path": "meta-llama/Llama-2-7b-hf"},
            "release they were made from, such as meta-llama/Llama-2-7b-hf, and set model.base: nf4 or fp8",
        ),
        ("llama2", {"quantization_config": "fp8"}, "unknown method"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "the same without, so set rope_scaling"),
        ("llama2", {"rope_scaling": {"type": "su", "factor": 2.0}}, "'su' is not supported; supported are"),
        ("llama2", {"rope_scaling": {"type": "linear"}}, "factor must be a positive number"),
        ("llama2", {"rope_scaling": {"full": {"rope_type": "linear"}}}, "one set for all layers"),
        ("llama2", {"rope_theta": -1}, "rope_theta must be a positive number"),
        ("llama2", {"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ("llama2", {"hidden_size": 66}, "hidden_size 66 is not a multiple"),
        ("llama2", {"head_dim": 15}, "head_dim 15 is odd"),
        ("llama2", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ("llama2", {"vocab_size": ...}, "vocab_size must be a positive integer, got None"),
        ("llama2", {"intermediate_size": True}, "intermediate_size must be a positive integer"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama2", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be null or a positive integer, got 0"),
        (
            "llama2",
            {"architectures": ["MixtralForCausalLM"]},
            "'MixtralForCausalLM' is not supported; use one of Llama",
        ),
        ("llama2", {"architectures": ["Qwen3MoeForCausalLM"]}, "'Qwen3MoeForCausalLM' is not supported"),
        ("llama2", {"architectures": ["Gemma3ForConditionalGeneration"]}, "'Gemma3ForConditionalGeneration' is not"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be"),
    ],
)
def test_unsupported_is_one_sentence(tmp_path: Path, kind: str, over: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arch(write(tmp_path, kind, **over))
    message = str(caught.value)
    assert words in message and "config.json" in message and message.endswith(".") and "\n" not in message


def test_missing_damaged_and_adapter_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; give a Hugging Face checkpoint"):
        read_arch(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="PEFT adapter; give its base"):
        read_arch(tmp_path)
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_arch(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="does not hold a JSON object"):
        read_arch(tmp_path)


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": ...}),
        *((kind, {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}) for kind in QWEN),
        *((kind, {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2}) for kind in QWEN),
        *((kind, {"use_sliding_window": False, "sliding_window": 48, "max_window_layers": 0}) for kind in QWEN),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_the_window_is_transformers(tmp_path: Path, kind: str, over: dict[str, Any]) -> None:
    """None where no layer of transformers' model slides."""
    found = read_arch(write(tmp_path, kind, **over)).sliding_window
    config = AutoConfig.from_pretrained(tmp_path)
    slides = kind == "mistral" or "sliding_attention" in config.layer_types
    assert found == (config.sliding_window if slides else None)


def test_reading_needs_no_torch() -> None:
    code = "import sys, pipeline.planning.arch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
