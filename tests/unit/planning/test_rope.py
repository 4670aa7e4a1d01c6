"""RoPE plans and tables: bit-equal to transformers, and exported so that both read the same plan back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from parallel.errors import ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.model.layers.rotary import apply_rope, inverse_frequencies, rope_tables
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.rope import RopePlan, hf_rope_fields, ntk_theta, plan_rope
from tests.support.tiny_models import tiny_config

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_scaling": None, "max_position_embeddings": 4096},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 7.3}, "max_position_embeddings": 32768},
    "llama3": {"rope_scaling": LLAMA31, "max_position_embeddings": 131072, "rope_theta": 500000.0},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
        "max_position_embeddings": 65536,
    },
    "yarn, every key": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
        "max_position_embeddings": 32768,
    },
    "yarn, own temperature": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "attention_factor": 0.9,
        },
        "max_position_embeddings": 4096,
    },
}


def config_of(**over: Any) -> dict[str, Any]:
    return tiny_config("llama2", **{"hidden_size": 512, "num_attention_heads": 4, "vocab_size": 8, **over})


def arch_of(folder: Path, **over: Any) -> LlamaArch:
    (folder / "config.json").write_text(json.dumps(config_of(**over)))
    return read_arch(folder)


def theirs(config: dict[str, Any]) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tables_bit_equal_transformers(tmp_path: Path, name: str, head_dim: int) -> None:
    over = {**SCALINGS[name], "hidden_size": 4 * head_dim}
    arch = arch_of(tmp_path, **over)
    plan = plan_rope(arch, RopeSettings(), arch.max_positions)
    rotary = theirs(config_of(**over))
    assert torch.equal(inverse_frequencies(plan, head_dim), rotary.inv_freq)
    assert plan.attention_factor == rotary.attention_scaling
    positions = torch.tensor([0, 1, 2, 4095, 4096, 32767, 99991, 131071])
    cos, sin = rope_tables(plan, head_dim, positions)
    want_cos, want_sin = rotary(torch.zeros(1), positions[None])
    for ours, want in ((cos, want_cos), (sin, want_sin)):
        assert ours.dtype is torch.float32 and torch.equal(ours, want[0, :, : head_dim // 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_bit_equal_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    arch = arch_of(tmp_path, **SCALINGS["yarn"])
    plan = plan_rope(arch, RopeSettings(), arch.max_positions)
    x_SBHD = torch.randn(12, 2, 3, 128).to(dtype)
    positions = torch.arange(60000, 60012)
    ours = apply_rope(x_SBHD, *rope_tables(plan, 128, positions))
    x_BHSD = x_SBHD.permute(1, 2, 0, 3)
    cos, sin = theirs(config_of(**SCALINGS["yarn"]))(x_BHSD, positions[None])
    want, _ = apply_rotary_pos_emb(x_BHSD, x_BHSD, cos, sin)
    assert ours.dtype is dtype and torch.equal(ours, want.permute(2, 0, 1, 3))


def test_long_positions_keep_fp32_precision() -> None:
    plan = RopePlan("none", 10000.0, 1.0, 131072)
    positions = torch.arange(131072 - 64, 131072)
    cos, sin = rope_tables(plan, 128, positions)
    exact = positions[:, None].double() * 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    # Three fp32 roundings (power, reciprocal, product) of an angle of up to 131072 rad: 2^-24 relative each.
    bound = 3 * 131072 * 2.0**-24
    assert (cos - exact.cos()).abs().max() < bound and (sin - exact.sin()).abs().max() < bound
    assert torch.equal(positions.float().long(), positions)


def test_tables_ignore_default_dtype_and_autocast() -> None:
    plan = RopePlan("yarn", 10000.0, 8.0, 4096, attention_factor=1.2)
    want = rope_tables(plan, 64, torch.arange(5))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = rope_tables(plan, 64, torch.arange(5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype is torch.float32 and torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_auto_keeps_what_fits_and_else_interpolates(tmp_path: Path) -> None:
    plain = arch_of(tmp_path, max_position_embeddings=4096)
    assert plan_rope(plain, RopeSettings(), 2048) == RopePlan("none", 10000.0, 1.0, 4096)
    assert plan_rope(plain, RopeSettings(), 32768) == RopePlan("linear", 10000.0, 8.0, 4096)
    assert plan_rope(plain, RopeSettings(factor=10.0), 32768).factor == 10.0
    assert plan_rope(plain, RopeSettings(original_context=8192), 32768).factor == 4.0
    llama3 = arch_of(tmp_path, **SCALINGS["llama3"])
    assert plan_rope(llama3, RopeSettings(), 131072).type == "llama3"


def test_linear_compounds_over_the_original_context(tmp_path: Path) -> None:
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 16384}
    scaled = arch_of(tmp_path, **linear, original_max_position_embeddings=4096)
    assert plan_rope(scaled, RopeSettings(), 16384) == RopePlan("linear", 10000.0, 4.0, 4096)
    assert plan_rope(scaled, RopeSettings(), 65536) == RopePlan("linear", 10000.0, 16.0, 4096)
    # Where the file does not tell, both readings exist (DeepSeek-Coder's is the stretched one): nothing is guessed.
    silent = arch_of(tmp_path, **linear)
    assert plan_rope(silent, RopeSettings(), 16384) == RopePlan("linear", 10000.0, 4.0, None)
    for settings in (RopeSettings(), RopeSettings(type="linear")):
        with pytest.raises(ConfigError, match="original_context: .* to 16384 if before, or to 4096 if after"):
            plan_rope(silent, settings, 65536)
    assert plan_rope(silent, RopeSettings(original_context=4096), 65536).factor == 16.0
    assert plan_rope(silent, RopeSettings(original_context=16384), 65536).factor == 4.0
    # LongLoRA's own releases keep Llama-2's 4096 there: nothing was pretrained on 512.
    published = arch_of(tmp_path, rope_scaling={"type": "linear", "factor": 8.0}, max_position_embeddings=4096)
    for told in (RopeSettings(), RopeSettings(original_context=4096)):
        assert plan_rope(published, told, 32768) == RopePlan("linear", 10000.0, 8.0, 4096)
        assert plan_rope(published, told, 65536) == RopePlan("linear", 10000.0, 16.0, 4096)


def test_forced_types(tmp_path: Path) -> None:
    arch = arch_of(tmp_path, max_position_embeddings=4096)
    ntk = plan_rope(arch, RopeSettings(type="ntk"), 32768)
    assert ntk == RopePlan("none", 10000.0 * 8.0 ** (128 / 126), 1.0, 32768)
    # The slowest pair is stretched by exactly the factor, the fastest not at all.
    ratio = inverse_frequencies(RopePlan("none", 1e4, 1.0, 1), 128) / inverse_frequencies(ntk, 128)
    assert math.isclose(ratio[-1], 8.0, rel_tol=1e-5) and ratio[0] == 1.0
    assert plan_rope(arch, RopeSettings(type="abf", theta=5e5), 32768) == RopePlan("none", 5e5, 1.0, 32768)
    assert plan_rope(arch, RopeSettings(type="none"), 32768) == RopePlan("none", 1e4, 1.0, 32768)
    assert plan_rope(arch, RopeSettings(type="linear"), 4096).type == "none"
    yarn = plan_rope(arch, RopeSettings(type="yarn"), 32768)
    assert (yarn.type, yarn.factor, yarn.attention_factor) == ("yarn", 8.0, 0.1 * math.log(8) + 1)
    llama3 = plan_rope(arch, RopeSettings(type="llama3", factor=8.0), 65536)
    assert (llama3.type, llama3.factor, llama3.original_context) == ("llama3", 8.0, 4096)
    assert ntk_theta(10000.0, 1.0, 128) == 10000.0


@pytest.mark.parametrize(
    ("over", "settings", "context", "words"),
    [
        ({}, {"factor": 4.0}, 4096, "fits the checkpoint's own 4096"),
        ({}, {"type": "linear", "factor": 2.0}, 32768, "is 8192, less than model.context 32768; use at least 8"),
        ({}, {"type": "linear", "theta": 5e5}, 8192, "model.rope.theta: type linear does not use it"),
        ({}, {"type": "none", "factor": 2.0}, 8192, "model.rope.factor: type none does not use it"),
        (SCALINGS["llama3"], {}, 262144, "uses llama3 scaling up to 131072 tokens"),
        (SCALINGS["yarn"], {}, 131072, "uses yarn scaling up to 65536 tokens"),
    ],
)
def test_contradictions(
    tmp_path: Path, over: dict[str, Any], settings: dict[str, Any], context: int, words: str
) -> None:
    arch = arch_of(tmp_path, **{"max_position_embeddings": 4096, **over})
    with pytest.raises(ConfigError) as caught:
        plan_rope(arch, RopeSettings(**settings), context)
    assert words in str(caught.value)


@pytest.mark.parametrize("base", SCALINGS)
@pytest.mark.parametrize(
    "settings",
    [
        {"type": "auto"},
        {"type": "none"},
        {"type": "linear"},
        {"type": "ntk"},
        {"type": "abf", "theta": 2.5e6},
        {"type": "yarn"},
        {"type": "llama3"},
    ],
    ids=lambda settings: settings["type"],
)
def test_exported_fields_read_back_the_same(tmp_path: Path, base: str, settings: dict[str, Any]) -> None:
    arch = arch_of(tmp_path, **SCALINGS[base])
    context = arch.max_positions if settings["type"] == "auto" else 2 * arch.max_positions
    if settings["type"] in ("auto", "linear", "ntk", "yarn", "llama3"):
        settings = {**settings, "original_context": 4096}
    plan = plan_rope(arch, RopeSettings(**settings), context)
    fields = hf_rope_fields(plan, arch, context)
    again = arch_of(tmp_path, **fields)
    assert again.max_positions == max(context, arch.max_positions)
    assert plan_rope(again, RopeSettings(), context) == plan
    old = {key: value for key, value in fields.items() if key != "rope_parameters"}
    new = {key: value for key, value in fields.items() if key not in ("rope_theta", "rope_scaling")}
    for dialect in (fields, old, {**new, "rope_theta": ..., "rope_scaling": ...}):
        rotary = theirs(config_of(**dialect))
        assert torch.equal(rotary.inv_freq, inverse_frequencies(plan, arch.head_dim))
        assert rotary.attention_scaling == plan.attention_factor
