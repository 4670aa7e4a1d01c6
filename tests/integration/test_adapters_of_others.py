"""Adapters that PEFT makes and Longspan does not: merged here and by PEFT itself, on the same base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parallel.errors import CheckpointError, ConfigError, LongspanError
from pipeline.config.run import RunConfig
from pipeline.config.sections import DataConfig, ModelConfig, TrainConfig
from pipeline.export.adapter_read import load_adapter
from pipeline.export.formats import export
from pipeline.export.verify import verify
from pipeline.training.init_from import open_source
from tests.integration.test_import_families import phi3
from tests.support.tiny_models import make_tiny
from tools.import_hf import import_model

QV = ["q_proj", "v_proj"]
PATTERNS = {
    "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
    "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5.0, "v_proj": 3},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": ("llama2", {"target_modules": QV, **PATTERNS}),
    "patterns, rslora": ("llama3", {"target_modules": QV, "use_rslora": True, **PATTERNS}),
    "dora": ("qwen2", {"target_modules": [*QV, "down_proj"], "use_dora": True}),
    "dora, patterns, rslora": ("smollm2", {"target_modules": QV, "use_dora": True, "use_rslora": True, **PATTERNS}),
    "dora of lm_head": ("qwen3", {"target_modules": ["o_proj", "lm_head"], "use_dora": True}),
    "vocabulary": ("mistral", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "embedding": ("llama2", {"target_modules": ["embed_tokens"], "rank_pattern": {"embed_tokens": 3}}),
}


def made(folder: Path, kind: str, settings: dict[str, Any]) -> tuple[Path, Path, Any]:
    """Base, adapter, and PEFT's model of both, see `moved`."""
    base = make_tiny(folder / "base", kind)
    model = moved(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter", model


def moved(network: Any, settings: dict[str, Any]) -> Any:
    """PEFT's model of a network and an adapter that is far from its start."""
    model = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
            elif "lora_" in name:
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(tmp_path: Path, case: str) -> None:
    base, adapter, theirs = made(tmp_path, *CASES[case])
    model = load_adapter(adapter, base)
    export(model, tmp_path / "merged", "merged")
    want = theirs.merge_and_unload().state_dict()
    found, old = load_file(tmp_path / "merged/model.safetensors"), load_file(base / "model.safetensors")
    moved = 0
    for name, tensor in found.items():
        assert (tensor - want[name]).abs().max() <= 2e-6 * want[name].abs().max(), name
        moved += not torch.equal(tensor, old[name])
    assert moved == len({name.rsplit(".lora_", 1)[0] for name in model.trained if ".lora_" in name})
    assert verify(model, tmp_path / "merged", "merged")["passed"]
    for form in ("adapter", "longlora"):
        with pytest.raises(CheckpointError, match="which Longspan merges and does not write; export it as merged"):
            export(model, tmp_path / f"out-{form}", form)


def test_a_run_does_not_begin_with_them(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, *CASES["dora"])
    config = RunConfig(ModelConfig(str(base), 64), DataConfig("text"), TrainConfig(steps=1), output="out")
    with (
        pytest.raises(ConfigError, match="has DoRA, which is not trained here; merge it"),
        open_source(adapter, config, "hash"),
    ):
        pass


def refused(base: Path, adapter: Path, kind: type[LongspanError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        load_adapter(adapter, base)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (
            "smollm2",
            {"target_modules": ["q_proj", "embed_tokens"]},
            "adapts model.embed_tokens alone, which the base ties",
        ),
        ("llama2", {"target_modules": ["embed_tokens"], "use_dora": True}, "adapts the embedding with DoRA"),
    ],
)
def test_what_merging_would_change(tmp_path: Path, kind: str, settings: dict[str, Any], words: str) -> None:
    base, adapter, _ = made(tmp_path, kind, settings)
    assert words in refused(base, adapter)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, *CASES["dora, patterns, rslora"])
    path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    path.write_text(json.dumps({**config, "rank_pattern": {"v_proj": 3}}))
    assert "gives model.layers.0.self_attn.v_proj rank 3, and its tensors have 2" in refused(base, adapter)
    path.write_text(json.dumps({**config, "rank_pattern": {"(": 3}}))
    assert "rank_pattern or alpha_pattern is no list of patterns and numbers" in refused(base, adapter)
    path.write_text(json.dumps(config))
    lost = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights)
    assert "lacks model.layers.1.self_attn.q_proj.lora_magnitude_vector" in refused(base, adapter)
    # Without the word for it magnitudes would be passed over.
    save_file(tensors, weights)
    path.write_text(json.dumps({**config, "use_dora": False}))
    assert "lora_magnitude_vector" in refused(base, adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "k_proj", "up_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"qkv_proj": 3}},
        {
            "target_modules": ["qkv_proj", "down_proj"],
            "use_dora": True,
            "rank_pattern": {"layers.1.self_attn.qkv_proj": 2},
        },
    ],
    ids=["generic list", "all-linear", "dora"],
)
def test_adapters_of_fused_projections(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of Phi-3's own, on the base that an import makes of it."""
    phi3(tmp_path / "phi")
    import_model(tmp_path / "phi", tmp_path / "base")
    theirs = moved(AutoModelForCausalLM.from_pretrained(tmp_path / "phi"), settings)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(tmp_path / "adapter", tmp_path / "base")
    assert (model.foreign is None) is (settings["target_modules"] != "all-linear" and "use_dora" not in settings)
    export(model, tmp_path / "merged", "merged")
    found, want = load_file(tmp_path / "merged/model.safetensors"), theirs.merge_and_unload().state_dict()
    for layer in (f"model.layers.{number}." for number in range(2)):
        joined = {
            "self_attn.qkv_proj": torch.cat([found[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]),
            "mlp.gate_up_proj": torch.cat([found[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")]),
        } | {name: found[f"{layer}{name}.weight"] for name in ("self_attn.o_proj", "mlp.down_proj")}
        for name, tensor in joined.items():
            wanted = want[f"{layer}{name}.weight"]
            assert (tensor - wanted).abs().max() <= 2e-6 * wanted.abs().max(), name
    weights = tmp_path / "adapter/adapter_model.safetensors"
    lost = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in load_file(weights).items() if name != lost}, weights)
    assert "lacks model.layers.1.self_attn.k_proj.lora_B.weight (3 of" in refused(
        tmp_path / "base", tmp_path / "adapter"
    )
