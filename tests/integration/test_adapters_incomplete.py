"""Adapters that lack what they say they have, or mean something else than plain LoRA, are refused, not merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parallel.errors import CheckpointError, LongspanError
from pipeline.config.rope import RopeSettings
from pipeline.export.adapter_read import load_adapter
from pipeline.export.formats import export, export_adapter
from pipeline.export.verify import verify
from pipeline.hf.checkpoint import HfCheckpoint
from tests.integration.test_import_export import trained_model
from tests.integration.test_longlora_files import CONTEXT, TOKENS, published
from tests.support.tiny_models import make_tiny
from tools.merge_lora import main as merge_main

WEIGHTS = "adapter_model.safetensors"


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def keep(path: Path, wanted: Callable[[str], bool]) -> None:
    """Delete the other tensors of a file."""
    save_file({name: tensor for name, tensor in load_file(path).items() if wanted(name)}, path)


def lost(folder: Path, base: Path | None = None, context: int | None = None) -> str:
    """What an adapter is refused with."""
    with pytest.raises(LongspanError) as caught:
        load_adapter(folder, base, context)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (lambda name: "lora_" not in name, "holds no LoRA tensor"),
        (lambda name: "lora_B" not in name, "lacks model.layers.0.self_attn.k_proj.lora_B.weight (8 of 16"),
        (lambda name: "lora_A" not in name, "lacks model.layers.0.self_attn.k_proj.lora_A.weight (8 of 16"),
        (lambda name: "v_proj.lora" not in name, "lacks model.layers.0.self_attn.v_proj.lora_A.weight (4 of 16"),
        (lambda name: "layers.1" not in name, "lacks model.layers.1.self_attn.k_proj.lora_A.weight (8 of 16"),
        (lambda name: "embed_tokens" not in name, "lacks model.embed_tokens.weight, which modules_to_save"),
        (lambda name: "model.norm" not in name, "lacks model.norm.weight, which modules_to_save"),
        (lambda name: "1.input_layernorm" not in name, "lacks model.layers.1.input_layernorm.weight, which modules_to"),
    ],
)
def test_tensors_lost_from_a_peft_adapter(
    tmp_path: Path, wanted: Callable[[str], bool], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    export(model, tmp_path / "a", "adapter")
    (tmp_path / "a/longspan.json").unlink()
    (tmp_path / "a/config.json").unlink()
    load_adapter(tmp_path / "a")
    keep(tmp_path / "a" / WEIGHTS, wanted)
    assert words in lost(tmp_path / "a")
    assert merge_main(["--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tensors_lost_from_longlora_files(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    whole = published(tmp_path / "whole", base, False)

    def store(file: str, wanted: Callable[[str], bool]) -> Path:
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "a")
        tensors = torch.load(whole / file, weights_only=True)
        torch.save({name: tensor for name, tensor in tensors.items() if wanted(name)}, tmp_path / "a" / file)
        return tmp_path / "a"

    factors, rest = "adapter_model.bin", "trainable_params.bin"
    assert "holds no LoRA tensor" in lost(store(factors, lambda name: False), base, CONTEXT)
    assert "(8 of 16 LoRA" in lost(store(factors, lambda name: "layers.0" not in name), base, CONTEXT)
    missing = lost(store(rest, lambda name: "0.post" not in name), base, CONTEXT)
    assert "trainable_params lacks model.layers.0.post_attention_layernorm.weight" in missing
    # Where no config tells the targets, layers tell of one another.
    edit(whole / "adapter_config.json", target_modules=None)
    load_adapter(whole, base, CONTEXT)
    assert "lacks model.layers.1.self_attn.q_proj" in lost(
        store(factors, lambda name: "1.self_attn.q" not in name), base, CONTEXT
    )


def test_files_lost_from_longspans_own_longlora_export(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    for name in ("a", "b", "c"):
        export(model, tmp_path / name, "longlora")
    for path in (tmp_path / "a").glob("trainable_params.*"):
        path.unlink()
    assert "holds 16 trained tensors where longspan.json counts 22" in lost(tmp_path / "a")
    keep(tmp_path / "b/trainable_params.safetensors", lambda name: "embed" not in name)
    assert "holds other tensors than trainable_params.bin beside it" in lost(tmp_path / "b")
    (tmp_path / "b/trainable_params.bin").unlink()
    assert "holds 21 trained tensors where longspan.json counts 22" in lost(tmp_path / "b")
    save_file({}, tmp_path / "c" / WEIGHTS)
    assert "holds no LoRA tensor" in lost(tmp_path / "c")


def test_files_of_two_adapters_are_not_mixed(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    adapter = published(tmp_path / "adapter", base, False)
    edit(adapter / "adapter_config.json", target_modules=["q_proj", "v_proj"])
    assert "adapts model.layers.0.self_attn.k_proj, which target_modules" in lost(adapter, base, CONTEXT)
    edit(adapter / "adapter_config.json", target_modules=["q_proj", "lm_head"])
    assert "lacks lm_head.lora_A.weight" in lost(adapter, base, CONTEXT)
    edit(adapter / "adapter_config.json", target_modules="(")
    assert "is no pattern" in lost(adapter, base, CONTEXT)


def peft_adapter(folder: Path, base: Path, **settings: Any) -> Any:
    """An adapter that PEFT itself makes and writes, with everything it trains changed; returns the network."""
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftLora(r=4, lora_alpha=8, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    return network.eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama2", {"target_modules": "all-linear"}),
        ("llama2", {"target_modules": r"model\.layers\.1\..*_proj"}),
        ("llama2", {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"]}),
        ("llama2", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        ("llama2", {"target_modules": ["q_proj", "no_such"], "modules_to_save": ["norm", "lm_head", "no_such"]}),
        ("llama2", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
        ("llama2", {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [3, 5]}}),
        ("smollm2", {"target_modules": ["v_proj"], "trainable_token_indices": [7, 1]}),
        ("smollm2", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama2", {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"}),
    ],
)
def test_what_peft_writes_merges_to_its_logits(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    network = peft_adapter(tmp_path / "adapter", make_tiny(tmp_path / "base", kind), **settings)
    assert merge_main(["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        want = network(TOKENS).logits
        assert (merged(TOKENS).logits - want).abs().max() <= 1e-4 * max(1.0, want.abs().max().item())


def test_a_grown_vocabulary_that_peft_saves_three_times_over(tmp_path: Path) -> None:
    """As after resize_token_embeddings: X.weight, X.modules_to_save.weight and X.original_module.weight."""
    base = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / "base", "llama2"))
    base.resize_token_embeddings(base.config.vocab_size + 3)
    settings = PeftLora(target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    network = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    network.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    assert sum("lm_head" in name for name in stored) == 3, sorted(stored)
    model = load_adapter(tmp_path / "adapter", tmp_path / "base")
    rows = network.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(model.trained["lm_head.weight"], rows)
    name = next(name for name in stored if name.endswith("lm_head.weight") and "modules" not in name)
    save_file({**stored, name: stored[name] + 1}, tmp_path / "adapter" / WEIGHTS)
    assert "are both lm_head.weight, so it is unclear which counts" in lost(tmp_path / "adapter", tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama2", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', a start that changes the base"),
        ("llama2", {"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ("llama2", {"layers_to_transform": 0}, "layers_to_transform is set"),
        ("llama2", {"layer_replication": [(0, 2), (1, 2)]}, "layer_replication is set"),
        ("smollm2", {"modules_to_save": ["lm_head"]}, "trained the embedding and the output weights apart"),
        ("smollm2", {"modules_to_save": ["embed_tokens"]}, "apart, .* does not set ensure_weight_tying"),
    ],
)
def test_what_peft_computes_otherwise_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], words: str
) -> None:
    """Each came out merged and verified, with other logits than PEFT's."""
    peft_adapter(tmp_path / "adapter", make_tiny(tmp_path / "base", kind), target_modules=["v_proj"], **settings)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(tmp_path / "adapter")


def test_single_rows_that_do_not_fit(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    model = trained_model(base, kinds=("norm",))
    embedding = HfCheckpoint(base).tensor("model.embed_tokens.weight")
    embedding[[3, 17]] += 1.0
    export_adapter(
        replace(model, trained={**model.trained, "model.embed_tokens.weight": embedding}),
        tmp_path / "a",
        embedding="rows",
    )
    assert torch.equal(load_adapter(tmp_path / "a").trained["model.embed_tokens.weight"], embedding)
    for wrong in ([3], [3, 3], [3, 129], [3, -1], [3, "x"], {"embed_tokens": [3, 17, 18]}, {"lm_head": [3, 17]}):
        edit(tmp_path / "a/adapter_config.json", trainable_token_indices=wrong)
        assert "trainable_token_indices do not fit" in lost(tmp_path / "a")
    # One more row than the base has, which its output matrix lacks.
    edit(tmp_path / "a/adapter_config.json", trainable_token_indices=[3, 128])
    assert "1 rows for added tokens and none of lm_head.weight" in lost(tmp_path / "a")
    edit(tmp_path / "a/adapter_config.json", trainable_token_indices={"embed_tokens": [3, 17], "lm_head": [3]})
    assert "lacks the rows of lm_head.weight" in lost(tmp_path / "a")
    edit(tmp_path / "a/adapter_config.json", trainable_token_indices="3")
    assert "trainable_token_indices are no list" in lost(tmp_path / "a")


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    export(model, tmp_path / "a", "adapter")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors["base_model.model.model.norm.modules_to_save.default.weight"] = torch.zeros(64)
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    assert "are both model.norm.weight" in lost(tmp_path / "a")


def test_an_adapter_of_some_layers_comes_back(tmp_path: Path) -> None:
    """Its export must not claim the other layers."""
    base = make_tiny(tmp_path / "base", "llama2")
    peft_adapter(tmp_path / "a", base, target_modules=["layers.1.self_attn.q_proj", "up_proj"])
    model = load_adapter(tmp_path / "a")
    for form in ("adapter", "longlora"):
        export(model, tmp_path / form, form)
        assert verify(model, tmp_path / form, form)["passed"]


def test_what_it_was_trained_with_is_not_overridden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))  # linear, factor 4, context 256
    for form in ("adapter", "longlora"):
        export(model, tmp_path / form, form)
        merge = ["--adapter", str(tmp_path / form), "--no-verify", "--force", "--output", str(tmp_path / "out")]
        for options, words in (
            (["--context", "64"], "says it was trained for 256"),
            (["--context", "512"], "says it was trained for 256"),
            (["--rope", "yarn"], "says it was trained with linear, factor 4"),
            (["--rope", "none"], "says it was trained with linear, factor 4"),
            (["--rope", "none", "--context", "-5"], "must be at least 2 tokens, got -5"),
            (["--context", "0"], "must be at least 2 tokens, got 0"),
        ):
            assert merge_main([*merge, *options]) == 2
            said = capsys.readouterr().err
            assert words in said and said.count("\n") == 1 and said.endswith(".\n")
            assert not (tmp_path / "out").exists()
        for options in ([], ["--context", "256"], ["--rope", "linear", "--context", "256"]):
            assert merge_main([*merge, *options]) == 0
            told = json.loads((tmp_path / "out/config.json").read_text())
            assert told["rope_scaling"] == {"factor": 4.0, "rope_type": "linear"}
            shutil.rmtree(tmp_path / "out")


def test_ntk_is_not_taken_for_none(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"), rope=RopeSettings(type="ntk", original_context=64))
    export(model, tmp_path / "a", "adapter")
    with pytest.raises(LongspanError, match="trained with none, factor 1, theta"):
        load_adapter(tmp_path / "a", rope=RopeSettings(type="none"))
    assert load_adapter(tmp_path / "a", rope=RopeSettings(type="ntk", original_context=64)).rope == model.rope


def test_longloras_files_need_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    adapter = published(tmp_path / "adapter", base, False)
    arguments = ["--adapter", str(adapter), "--base", str(base), "--output", str(tmp_path / "out"), "--rope", "linear"]
    assert merge_main(arguments) == 2
    assert "--context: is missing" in capsys.readouterr().err
    # A PEFT adapter whose config.json tells of a stretched base, and longspan.json was not copied.
    export(trained_model(base), tmp_path / "peft", "adapter")
    (tmp_path / "peft/longspan.json").unlink()
    assert "--context: is missing" in lost(tmp_path / "peft")
    assert load_adapter(tmp_path / "peft", context=256).rope == trained_model(base).rope


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "null",
        '"x"',
        "\x00",
        {"format": 2},
        {"context": "128"},
        {"context": None},
        {"context": 0},
        {"step": [1]},
        {"base_hash": 3},
        {"tensors": "22"},
        {"rope_plan": []},
        {"rope_plan": {"type": "linear"}},
        {"rope_plan+": {"from_the_future": 1}},
        {"rope_plan+": {"type": "longrope"}},
        {"rope_plan+": {"type": ["linear"]}},
        {"rope_plan+": {"factor": "2"}},
        {"rope_plan+": {"factor": -1}},
        {"rope_plan+": {"original_context": 64.5}},
        {"rope_plan+": {"truncate": 1}},
    ],
)
def test_a_damaged_or_newer_note_gets_a_sentence(tmp_path: Path, text: Any) -> None:
    export(trained_model(make_tiny(tmp_path / "base", "llama2")), tmp_path / "a", "adapter")
    path = tmp_path / "a/longspan.json"
    note = json.loads(path.read_text())
    if isinstance(text, dict):
        text = {"rope_plan": {**note["rope_plan"], **text["rope_plan+"]}} if "rope_plan+" in text else text
        text = json.dumps({**note, **text})
    path.write_text(text)
    message = lost(tmp_path / "a")
    assert message.startswith(str(path))


def test_a_note_of_before_tensors_were_counted_is_read(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    export(model, tmp_path / "a", "adapter")
    path = tmp_path / "a/longspan.json"
    note = json.loads(path.read_text())
    assert note.pop("format") == 1 and note.pop("tensors") == len(model.trained)
    path.write_text(json.dumps(note))
    back = load_adapter(tmp_path / "a")
    assert (back.rope, back.context, back.step) == (model.rope, 256, 12)
    del note["context"]
    path.write_text(json.dumps(note))
    assert "context is missing beside rope_plan" in lost(tmp_path / "a")
