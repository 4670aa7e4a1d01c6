"""What a checkpoint's own RoPE serves, what replaces it, and odd fields of config.json; transformers is the judge."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from parallel.errors import ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import ModelConfig
from pipeline.config.yaml_file import load_config
from pipeline.model.layers.rotary import inverse_frequencies
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.rope import RopePlan, hf_rope_fields, plan_rope, replacement_warning, served_context
from pipeline.planning.run_plan import plan_model
from pipeline.preflight import files
from tests.support.tiny_models import tiny_config

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32 = {**LLAMA31, "factor": 32.0}
QWEN25 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
PUBLISHED = {
    "Llama-2": (None, 4096, 1e4, 4096),
    "Llama-2-7b-longlora-32k": ({"type": "linear", "factor": 8.0}, 4096, 1e4, 32768),
    "vicuna-7b-v1.5-16k": ({"type": "linear", "factor": 4.0}, 4096, 1e4, 16384),
    "deepseek-coder-6.7b": ({"type": "linear", "factor": 4.0}, 16384, 1e5, 16384),
    "Llama-3.1": (LLAMA31, 131072, 5e5, 131072),
    "Llama-3.2": (LLAMA32, 131072, 5e5, 262144),
    "Qwen2.5 with YaRN": (QWEN25, 32768, 1e6, 131072),
    "Qwen2.5 with YaRN, extended limit": (QWEN25, 131072, 1e6, 131072),
    "DeepSeek's fields": (DEEPSEEK, 163840, 1e4, 163840),
    "YaRN, no original": ({"type": "yarn", "factor": 2.0}, 4096, 1e4, 8192),
}
"""Name -> rope_scaling, max_position_embeddings, theta, tokens that it serves by its publisher's word."""


def config_of(**over: Any) -> dict[str, Any]:
    return tiny_config("llama2", **{"hidden_size": 512, "num_attention_heads": 4, "vocab_size": 8, **over})


def arch_of(folder: Path, **over: Any) -> LlamaArch:
    (folder / "config.json").write_text(json.dumps(config_of(**over)))
    return read_arch(folder)


def published(folder: Path, name: str) -> tuple[LlamaArch, int]:
    scaling, declared, theta, served = PUBLISHED[name]
    return arch_of(folder, rope_scaling=scaling, max_position_embeddings=declared, rope_theta=theta), served


def check_same(folder: Path, plan: RopePlan, head_dim: int, dialects: bool = True) -> None:
    """transformers, reading config.json of `folder`, turns by the plan's angles; in either dialect alone too."""
    whole = json.loads((folder / "config.json").read_text())
    without = [()] + ([("rope_parameters",), ("rope_scaling", "rope_theta")] if dialects else [])
    for dropped in without:
        rotary = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in whole.items() if k not in dropped}))
        assert torch.equal(rotary.inv_freq, inverse_frequencies(plan, head_dim))
        assert rotary.attention_scaling == plan.attention_factor


@pytest.mark.parametrize("name", PUBLISHED)
def test_served_context_of_published_checkpoints(tmp_path: Path, name: str) -> None:
    arch, served = published(tmp_path, name)
    assert served_context(arch) == served
    _, plan = plan_model(ModelConfig("base", served), arch)
    check_same(tmp_path, plan, arch.head_dim, dialects=False)
    # What is exported serves the same, and is read back as the same plan.
    (tmp_path / "config.json").write_text(json.dumps(config_of(**hf_rope_fields(plan, arch, served))))
    again = read_arch(tmp_path)
    check_same(tmp_path, plan, arch.head_dim)
    assert plan_rope(again, RopeSettings(), served) == plan
    assert served_context(again) == served


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_the_next_extension_counts_from_the_original(tmp_path: Path, name: str, kind: str) -> None:
    """Extended to twice what is served, exported, and extended once more: the factors are of the first context."""
    arch, served = published(tmp_path, name)
    original = {None: 4096, "linear": 4096, "yarn": 4096, "llama3": 8192}[(arch.rope_scaling or {}).get("rope_type")]
    original = 32768 if name.startswith("Qwen") else original
    for times in (2, 4):
        context = times * served
        told = 4096 if name.startswith("deepseek") and times == 2 else None
        _, plan = plan_model(ModelConfig("base", context, rope=RopeSettings(kind, original_context=told)), arch)
        assert (plan.type, plan.factor, plan.original_context) == (kind, context / original, original)
        (tmp_path / "config.json").write_text(json.dumps(config_of(**hf_rope_fields(plan, arch, context))))
        check_same(tmp_path, plan, arch.head_dim)
        arch = read_arch(tmp_path)
        assert served_context(arch) == context


def test_nothing_is_made_up(tmp_path: Path) -> None:
    arch, _ = published(tmp_path, "deepseek-coder-6.7b")
    plan = plan_rope(arch, RopeSettings(), 16384)
    assert "original_max_position_embeddings" not in json.dumps(hf_rope_fields(plan, arch, 16384))
    told = plan_rope(arch, RopeSettings(original_context=4096), 16384)
    assert hf_rope_fields(told, arch, 16384)["original_max_position_embeddings"] == 4096
    arch, _ = published(tmp_path, "Llama-2-7b-longlora-32k")
    plan = plan_rope(arch, RopeSettings(), 4096)
    assert hf_rope_fields(plan, arch, 4096)["original_max_position_embeddings"] == 4096


def test_temperature_follows_the_checkpoints_rule(tmp_path: Path) -> None:
    """YaRN stretched further: transformers computes from the checkpoint's own fields, with the factor raised."""
    for fields in (
        {},
        {"mscale": 0.7, "mscale_all_dim": 0.4},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"attention_factor": 1.0},
        {"beta_fast": 24, "beta_slow": 2, "truncate": False},
    ):
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, **fields}
        arch = arch_of(tmp_path, rope_scaling=scaling, max_position_embeddings=16384)
        plan = plan_rope(arch, RopeSettings(type="yarn"), 65536)
        arch_of(tmp_path, rope_scaling={**scaling, "factor": 16.0}, max_position_embeddings=65536)
        check_same(tmp_path, plan, arch.head_dim, dialects=False)


REPLACED = [
    ("Llama-3.1", {"type": "linear"}, 32768, "llama3 scaling (factor 8 of 8192) reaches 131072 tokens"),
    ("Llama-3.1", {"type": "none"}, 131072, "type none would replace it"),
    ("Llama-3.1", {"type": "llama3"}, 131072, "type llama3 would replace it"),  # by factor 16
    ("Llama-3.1", {"type": "abf", "theta": 8e6}, 131072, "type abf would replace it"),
    ("Llama-3.1", {"type": "yarn"}, 4096, "type yarn would replace it"),  # by nothing at all
    ("Qwen2.5 with YaRN", {"type": "linear"}, 131072, "yarn scaling (factor 4 of 32768) reaches 131072 tokens"),
    ("Qwen2.5 with YaRN", {"type": "ntk"}, 65536, "type ntk would replace it"),
    ("Llama-2-7b-longlora-32k", {"type": "yarn"}, 32768, "linear scaling (factor 8) reaches 32768 tokens"),
]


@pytest.mark.parametrize(("name", "settings", "context", "words"), REPLACED)
def test_scaling_that_reaches_is_not_replaced_without_a_word(
    tmp_path: Path, name: str, settings: dict[str, Any], context: int, words: str
) -> None:
    arch, _ = published(tmp_path, name)
    with pytest.raises(ConfigError) as caught:
        plan_model(ModelConfig("base", context, rope=RopeSettings(**settings)), arch)
    said = str(caught.value)
    assert words in said and "use type: auto" in said and "model.rope.replace: true" in said
    finding, _ = files.check_settings(ModelConfig("base", context, rope=RopeSettings(**settings)), arch)
    assert finding.problem == said
    # Said to be meant, it goes on, and is told as a warning.
    meant = ModelConfig("base", context, rope=RopeSettings(**settings, replace=True))
    _, plan = plan_model(meant, arch)
    finding, _ = files.check_settings(meant, arch)
    assert finding.advice == replacement_warning(arch, plan) and "is replaced by" in finding.advice[0]
    # Left to auto it stays.
    assert replacement_warning(arch, plan_model(ModelConfig("base", context), arch)[1]) == ()


def test_scaling_that_does_not_reach_is_replaced_with_a_warning(tmp_path: Path) -> None:
    arch, _ = published(tmp_path, "Llama-3.1")
    _, plan = plan_model(ModelConfig("base", 524288, rope=RopeSettings(type="linear")), arch)
    (said,) = replacement_warning(arch, plan)
    assert "llama3 scaling (factor 8 of 8192), which serves 131072 tokens, is replaced by linear, factor 64" in said
    # The same numbers written out replace nothing, nor is there anything to replace in plain RoPE.
    arch, _ = published(tmp_path, "Qwen2.5 with YaRN")
    assert replacement_warning(arch, plan_model(ModelConfig("b", 131072, rope=RopeSettings("yarn")), arch)[1]) == ()
    arch, _ = published(tmp_path, "Llama-2")
    assert replacement_warning(arch, plan_model(ModelConfig("b", 32768, rope=RopeSettings("yarn")), arch)[1]) == ()


def test_auto_is_the_default_and_replace_belongs_to_the_others(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m, context: 32768}\ndata: {path: d}\ntrain: {steps: 1, global_batch: 1}\noutput: o\n"
    )
    assert load_config(path, []).model.rope == RopeSettings(type="auto")
    with pytest.raises(ConfigError, match=r"model.rope.replace: type auto does not use it"):
        load_config(path, ["model.rope.replace=true"])
    assert load_config(path, ["model.rope={type: linear, replace: true}"]).model.rope.replace


ODD: dict[str, list[Any]] = {
    "rope_scaling": [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": None},
        {"type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": None, "mscale": 0, "mscale_all_dim": 1.0},
        {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
        {"type": "yarn", "factor": 8, "attention_factor": 1.25, "mscale": 0.5, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "type": "linear", "factor": 2.0, "rope_theta": 777.0},
        {**LLAMA31, "original_max_position_embeddings": 100, "high_freq_factor": 8, "low_freq_factor": 2},
        {k: v for k, v in LLAMA31.items() if k != "original_max_position_embeddings"},
        {"type": "linear", "factor": 0.5, "attention_factor": 3.0},
        {"rope_type": "default", "factor": 9.0, "attention_factor": 3.0},
        {},
        None,
    ],
    "rope_parameters": [..., {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e4}, {"rope_theta": 123.0}],
    "rope_theta": [..., 1e6, 500],
    "original_max_position_embeddings": [..., 2048],
    "head_dim": [..., 32, 160],
}
"""Fields of config.json; ...: absent."""


def test_odd_fields_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """Every combination: the angles are transformers', or theta stands where transformers does not look."""
    refused = 0
    for values in itertools.product(*ODD.values()):
        over = dict(zip(ODD, values, strict=True))
        whole = config_of(**over, max_position_embeddings=4096)
        try:
            theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(whole))))
        except (KeyError, ValueError, TypeError):
            continue
        scaling, elsewhere = over["rope_scaling"] or {}, over["rope_parameters"] is not ...
        if scaling and elsewhere and over["rope_theta"] is ... and "rope_theta" not in scaling:
            with pytest.raises(ConfigError, match="rope_theta stands in rope_parameters only"):
                arch_of(tmp_path, **over, max_position_embeddings=4096)
            refused += 1
            continue
        arch = arch_of(tmp_path, **over, max_position_embeddings=4096)
        plan = plan_rope(arch, RopeSettings(), 4096)
        assert torch.equal(theirs.inv_freq, inverse_frequencies(plan, arch.head_dim)), over
        assert theirs.attention_scaling == plan.attention_factor, over
    assert refused == 96


@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig, Qwen2Config])
def test_a_base_that_is_not_given_is_transformers_default(tmp_path: Path, family: type) -> None:
    kind = {"llama": "llama2"}.get(family.model_type, family.model_type)
    config = tiny_config(kind, rope_theta=..., rope_scaling=...)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, family)
    assert read_arch(tmp_path).rope_theta == theirs.rope_parameters["rope_theta"]


def test_an_open_original_context_survives_the_note(tmp_path: Path) -> None:
    from pipeline.export.adapter_notes import read_note

    plan = RopePlan("linear", 1e4, 8.0, None)
    note = {"format": 1, "context": 4096, "rope_plan": vars(plan)}
    (tmp_path / "longspan.json").write_text(json.dumps(note))
    assert read_note(tmp_path).plan == plan
    (tmp_path / "longspan.json").write_text(json.dumps({**note, "rope_plan": vars(replace(plan, type="yarn"))}))
    with pytest.raises(Exception, match="original_context is None, so it is damaged"):
        read_note(tmp_path)
