"""Verify against a wrong config.json: faults are planted there after an export, or into what writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from parallel.errors import CheckpointError
from parallel.world.grid import plan_grid
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LORA_TARGETS, LoraConfig
from pipeline.export.formats import export
from pipeline.export.trained_model import TrainedModel
from pipeline.export.verify import sample_positions, sample_tokens, verify
from pipeline.export.verify_logits import trained_weights
from pipeline.export.verify_reference import own_logits
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.chunk import LlamaChunk
from pipeline.model.megatron_config import transformer_config
from pipeline.model.weights.load import init_adapters, load_base, load_trained, mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout
from pipeline.planning.rope import hf_rope_fields, plan_rope
from tests.integration.test_import_export import CONTEXT, trained_model
from tests.support.single import single_groups
from tests.support.tiny_models import KINDS, make_tiny

FORMS = ("merged", "adapter", "longlora")
ROPES: dict[str, RopeSettings] = {
    "linear": RopeSettings(type="linear", original_context=64),
    "yarn": RopeSettings(type="yarn", original_context=64),
    "llama3": RopeSettings(type="llama3", original_context=64),
    "ntk": RopeSettings(type="ntk", original_context=64),
    "abf": RopeSettings(type="abf", theta=2e6),
}
"""Every one beyond the 64 or 128 positions of the tiny bases, to CONTEXT."""


def stage_logits(model: TrainedModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of the model that trains, at positions 0, 1, 2 ..."""
    config = transformer_config(model.arch, plan_grid(1, 1, 1, 1), torch.float32, torch.device("cpu"))
    stage = LlamaChunk(model.arch, model.rope, model.lora, config, single_groups().collection)
    load_base(stage, HfCheckpoint(model.base))
    init_adapters(stage, 0)
    mark_trainable(stage, ("lora", "embed", "norm"))
    load_trained(stage, model.trained)
    return stage.eval().logits(tokens_BS, SequenceLayout.dense(*tokens_BS.shape), AttentionSpec("full", 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_model_that_trains(tmp_path: Path, kind: str) -> None:
    """`own_logits` against `LlamaChunk`, over the whole new context and for every RoPE; LoRA on every product."""
    base = make_tiny(tmp_path, kind)
    tokens = sample_tokens(read_arch(base).vocab, CONTEXT)[:1]
    positions = [torch.arange(CONTEXT)]
    for name, rope in ROPES.items() if kind in ("llama2", "llama3") else [("linear", ROPES["linear"])]:
        lora = LoraConfig(rank=4, alpha=8.0, targets=LORA_TARGETS)
        model = trained_model(base, lora, rope=rope)
        want = stage_logits(model, tokens)
        for apart in (False, True):
            weight = trained_weights(model, "adapter", apart)
            (found,) = own_logits(model, weight, tokens, positions, apart)
            assert (found - want).abs().max() <= 1e-4 * want.abs().max(), name
        assert want.abs().max() > 0.1, "a model of zeros would pass"


def set_rope(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Change RoPE's fields in both dialects; `...` removes one."""

    def change(config: dict[str, Any]) -> None:
        for name in ("rope_scaling", "rope_parameters"):
            config[name] = {k: v for k, v in ((config[name] or {}) | fields).items() if v is not ...}
        if "rope_theta" in fields:
            config["rope_theta"] = fields["rope_theta"]

    return change


def put(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(fields)


def drop_rope(config: dict[str, Any]) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    config["rope_scaling"] = None


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "factor halved": ("linear", set_rope(factor=2.0), "turns pair 0 of a head 2 times as fast as in training"),
    "theta": ("linear", set_rope(rope_theta=1e6), "turns pair 1 of a head"),
    "RoPE dropped": ("linear", drop_rope, "RoPE is of type 'default', and the model was trained with linear, factor 4"),
    "another type": (
        "linear",
        set_rope(rope_type="yarn", original_max_position_embeddings=64),
        "RoPE is of type 'yarn'",
    ),
    "dynamic": ("ntk", set_rope(rope_type="dynamic", factor=4.0), "RoPE is of type 'dynamic'"),
    "only for transformers 4": (
        "linear",
        lambda c: c["rope_scaling"].update(factor=2.0),
        "2 times as fast as in training",
    ),
    "only for transformers 5": (
        "linear",
        lambda c: c["rope_parameters"].update(factor=2.0),
        "without rope_scaling and rope_theta: its RoPE turns pair 0 of a head 2 times",
    ),
    "temperature": ("yarn", set_rope(attention_factor=1.0), "scales cos and sin by 1, and training did by 1.138"),
    "ramp": ("yarn", set_rope(beta_slow=0.25), "turns pair"),
    "original": ("llama3", set_rope(original_max_position_embeddings=128), "turns pair"),
    "bands": ("llama3", set_rope(high_freq_factor=8.0), "turns pair"),
    "base of ntk lost": ("ntk", set_rope(rope_theta=10000.0), "turns pair 1 of a head"),
    "eps": ("linear", put(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, and the model was trained with 1e-05"),
    "tied": ("linear", put(tie_word_embeddings=True), "tie_word_embeddings is True"),
    "heads": ("linear", put(num_attention_heads=8), "num_attention_heads is 8"),
    "key heads": ("linear", put(num_key_value_heads=1), "num_key_value_heads is 1"),
    "layers": ("linear", put(num_hidden_layers=1), "num_hidden_layers is 1"),
    "activation": ("linear", put(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "limit": ("linear", put(max_position_embeddings=64), "max_position_embeddings is 64"),
    "model type": ("linear", put(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), "model_type is 'qwen2'"),
    "nonsense": ("linear", put(model_type="none such"), "transformers does not read it"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_config_is_named_and_a_right_one_passes(tmp_path: Path, form: str) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    for rope in ("linear", "yarn", "llama3", "ntk"):
        model, folder = trained_model(base, rope=ROPES[rope]), tmp_path / rope
        export(model, folder, form)
        path = folder / "config.json"
        good = path.read_text()
        for layerwise in (False, True):
            assert verify(model, folder, form, layerwise=layerwise)["passed"]
        for name, (kind, plant, words) in FAULTS.items():
            if kind != rope:
                continue
            config = json.loads(good)
            plant(config)
            path.write_text(json.dumps(config))
            with pytest.raises(CheckpointError) as caught:
                verify(model, folder, form)
            said = str(caught.value)
            assert words in said and "config.json" in said and "Do not use this export" in said, name
            report = json.loads((folder / "verify.json").read_text())
            assert report["passed"] is False and words in report["error"], name
        path.write_text(good)
        assert verify(model, folder, form)["passed"]


@pytest.mark.parametrize("form", FORMS)
def test_a_writer_that_writes_another_factor_is_caught(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a check against the writer's own output cannot see; by the angles, and by the logits alone."""

    def wrong(plan: Any, arch: Any, context: int) -> dict[str, Any]:
        fields = right(plan, arch, context)
        for name in ("rope_scaling", "rope_parameters"):
            fields[name]["factor"] /= 2
        return fields

    right = hf_rope_fields
    monkeypatch.setattr("pipeline.export.trained_model.hf_rope_fields", wrong)
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    export(model, tmp_path / "out", form)
    with pytest.raises(CheckpointError, match="turns pair 0 of a head 2 times as fast"):
        verify(model, tmp_path / "out", form)
    # The loaded model's own angles.
    monkeypatch.setattr("pipeline.export.verify.check_config", lambda *_: None)
    with pytest.raises(CheckpointError, match="loaded.*turns pair 0 of a head 2 times as fast"):
        verify(model, tmp_path / "out", form, layerwise=False)
    # The logits.
    monkeypatch.setattr("pipeline.export.verify_logits.check_rotary", lambda *_: None)
    for layerwise in (False, True):
        with pytest.raises(CheckpointError, match="its logits differ from the trained model's by"):
            verify(model, tmp_path / "out", form, layerwise=layerwise)


def test_long_positions_are_looked_at(tmp_path: Path) -> None:
    """The last token stands at the end of the new context, beyond what the base was made for."""
    sets = sample_positions(32, 1024)
    assert sets["short"].tolist() == list(range(32)) and sets["long"][-1] == 1023
    model = trained_model(make_tiny(tmp_path, "llama2"))
    tokens = sample_tokens(model.arch.vocab)
    weight = trained_weights(model, "merged")
    found = own_logits(model, weight, tokens, list(sets.values()), False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 1024})
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weight(name))
        for where, logits in zip(sets.values(), found, strict=True):
            mask = torch.ones_like(tokens)
            want = theirs(tokens, position_ids=where[None].expand_as(tokens), attention_mask=mask).logits
            assert (logits - want).abs().max() <= 1e-4


def test_the_plan_is_the_trainers(tmp_path: Path) -> None:
    """A base already at its factor: verify passes what training computed with, though nothing tells the original."""
    base = make_tiny(tmp_path / "base", "llama2", rope_scaling={"type": "linear", "factor": 8.0})
    model = trained_model(base, rope=RopeSettings())
    assert model.rope == plan_rope(read_arch(base), RopeSettings(), CONTEXT) and model.rope.factor == 8.0
    export(model, tmp_path / "out", "merged")
    assert verify(model, tmp_path / "out", "merged")["passed"]
