"""LongLoRA's two files and PEFT adapters, in and out, against what LongLoRA's own merge script does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parallel.errors import CheckpointError, ConfigError
from pipeline.export.adapter_read import load_adapter
from pipeline.export.adapter_write import export_adapter
from pipeline.export.formats import export
from pipeline.export.verify import verify
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.planning.arch import read_arch
from pipeline.storage.pickled import read_pickled
from tests.integration.test_import_export import trained_model
from tests.support.tiny_models import make_tiny, write_tokenizer
from tools.import_hf import main as import_main
from tools.merge_lora import main as merge_main

VOCAB, CONTEXT, SCALE = 128, 250, 2.0
TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


def published(folder: Path, base: Path, pad: bool, write: Callable[[dict, Path], None] = torch.save) -> Path:
    """An adapter as LongLoRA's get_trainable_weights.py leaves it: two pickles of tensors."""
    folder.mkdir()
    source, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(5)
    factors, whole = {}, {}
    for name, tensor in source.items():
        if any(f"{part}_proj.weight" in name for part in "qkvo") and "self_attn" in name:
            stem = "base_model.model." + name.removesuffix(".weight")
            factors[f"{stem}.lora_A.weight"] = torch.randn(4, tensor.shape[1], generator=generator) * 0.15
            factors[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], 4, generator=generator) * 0.15
        elif "embed" in name or "norm" in name:
            if "embed" in name and pad:
                tensor = torch.cat((tensor, torch.zeros(1, tensor.shape[1])))
            whole[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    write(factors, folder / "adapter_model.bin")
    write(whole, folder / "trainable_params.bin")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "base_model_name_or_path": "meta/Llama-2"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **targets, "modules_to_save": None}))
    return folder


def merged_by_their_script(adapter: Path, base: Path, pad: bool) -> Any:
    """merge_lora_weights_and_save_hf_model.py, with weights_only=True, on transformers and PEFT."""
    config = AutoConfig.from_pretrained(base)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": theta}
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    if pad:
        model.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
        for matrix in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
            matrix[-1:] = matrix[:-1].mean(dim=0, keepdim=True)
    model.load_state_dict(torch.load(adapter / "trainable_params.bin", weights_only=True), strict=False)
    # Their PEFT read .bin; today's does too.
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize("pad", [False, True], ids=["32000 rows", "[PAD], 32001 rows"])
def test_published_checkpoint_merges_as_their_script_does(
    tmp_path: Path, pad: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    write_tokenizer(base, VOCAB)
    adapter = published(tmp_path / "adapter", base, pad)
    arguments = ["--adapter", str(adapter), "--base", str(base), "--context", str(CONTEXT), "--output"]
    assert merge_main([*arguments, str(tmp_path / "merged")]) == 0
    assert "verified (whole model)" in capsys.readouterr().out
    theirs, ours = merged_by_their_script(adapter, base, pad).eval(), tmp_path / "merged"
    network = AutoModelForCausalLM.from_pretrained(ours).eval()
    assert network.config.vocab_size == VOCAB + pad and network.config.rope_parameters["factor"] == 4.0
    state = theirs.state_dict()
    for name, tensor in load_file(ours / "model.safetensors").items():
        assert (tensor - state[name]).abs().max() <= 1e-6
    with torch.no_grad():
        want = theirs(TOKENS).logits
        assert (network(TOKENS).logits - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
    tokenizer = AutoTokenizer.from_pretrained(ours)
    if pad:
        assert tokenizer.convert_tokens_to_ids("[PAD]") == VOCAB and tokenizer.pad_token == "[PAD]"
    # A merged LongLoRA model is a base like any other.
    assert read_arch(ours).vocab == VOCAB + pad


def test_two_files_as_safetensors_read_the_same(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    one = load_adapter(published(tmp_path / "a", base, False), base, CONTEXT)

    def save(tensors: dict, path: Path) -> None:
        save_file(tensors, path.with_suffix(".safetensors"))

    other = load_adapter(published(tmp_path / "b", base, False, save), base, CONTEXT)
    assert set(one.trained) == set(other.trained) and one.lora == other.lora and one.lora.scale == SCALE
    assert all(torch.equal(one.trained[name], other.trained[name]) for name in one.trained)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_pickles_that_hold_more_than_tensors_are_refused(tmp_path: Path) -> None:
    base, marker = make_tiny(tmp_path / "base", "llama2"), tmp_path / "ran"
    adapter = published(tmp_path / "adapter", base, False)
    file = adapter / "trainable_params.bin"
    good = file.read_bytes()
    torch.save({"x": Evil(marker)}, file)
    with pytest.raises(CheckpointError, match=r"trainable_params.bin: is no plain torch.save of tensors.*convert it"):
        load_adapter(adapter, base, CONTEXT)
    assert not marker.exists()
    for bad, words in (
        ({"x": [1, 2]}, "holds other things than named tensors"),
        ({"x": torch.zeros(2, dtype=torch.int8)}, "x has dtype torch.int8"),
    ):
        torch.save(bad, file)
        with pytest.raises(CheckpointError, match=words):
            read_pickled(file)
    torch.save({"x": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="is no plain torch.save"):
        read_pickled(file)
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="is no plain torch.save"):
        read_pickled(file)
    file.unlink()
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no adapter_model"):
        load_adapter(adapter, base, CONTEXT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "lacks model.layers.0.*lora_magnitude_vector"),
        ({"peft_type": "LOHA"}, "not a LoRA adapter"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"r": 5}, "gives .* rank 5, and its tensors have 4"),
        ({"lora_alpha": None}, "lacks a usable r or lora_alpha"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    path = published(tmp_path / "adapter", base, False) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((CheckpointError, ConfigError), match=words):
        load_adapter(path.parent, base, CONTEXT)


@pytest.mark.parametrize("kind", ["llama2", "llama32", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", ["longlora", "adapter"])
def test_forms_come_back_bit_for_bit(tmp_path: Path, kind: str, form: str) -> None:
    model = trained_model(make_tiny(tmp_path / "base", kind, dtype=torch.bfloat16))
    export(model, tmp_path / "out", form)
    report = verify(model, tmp_path / "out", form)
    assert report["passed"] and report["max_abs_logit_difference"] <= 1e-5
    assert report["tensors"]["bit_equal"] == len(model.trained) and set(report["logits"]) == {"short", "long"}
    assert report["logits"]["long"]["positions"] == [0, 255]
    back = load_adapter(tmp_path / "out")
    assert (back.rope, back.context, back.base_hash, back.step) == (model.rope, 256, model.base_hash, 12)
    if form == "longlora":
        plain = torch.load(tmp_path / "out/trainable_params.bin", weights_only=True)
        assert {name for name in model.trained if "lora" not in name} == set(plain)
        stored = load_file(tmp_path / "out/trainable_params.safetensors")
        assert all(torch.equal(plain[name], stored[name]) for name in stored)
    # The same by layers, as for a model that does not fit into memory.
    layered = verify(model, tmp_path / "out", form, layerwise=True)
    assert layered["mode"] == "layer by layer" and layered["max_abs_logit_difference"] == 0
    assert any("Loading by transformers and PEFT as a whole" in line for line in layered["not_checked"])


@pytest.mark.parametrize("kind", ["llama2", "smollm2"])
def test_few_changed_rows_go_as_trainable_token_indices(tmp_path: Path, kind: str) -> None:
    base = make_tiny(tmp_path / "base", kind)
    model = trained_model(base, kinds=("norm",))
    embedding = HfCheckpoint(base).tensor("model.embed_tokens.weight")
    embedding[[3, 17, 90]] += 1.0
    model = replace(model, trained={**model.trained, "model.embed_tokens.weight": embedding})
    export_adapter(model, tmp_path / "rows", embedding="auto")
    config = json.loads((tmp_path / "rows/adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [3, 17, 90]}
    assert "embed_tokens" not in config["modules_to_save"]
    export_adapter(model, tmp_path / "whole")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("rows", "whole")]
    assert sizes[0] < sizes[1] - 20_000
    for name in ("rows", "whole"):
        assert verify(model, tmp_path / name, "adapter", TOKENS)["passed"]
    assert torch.equal(load_adapter(tmp_path / "rows").trained["model.embed_tokens.weight"], embedding)
    everywhere = trained_model(base)
    export_adapter(everywhere, tmp_path / "many", embedding="auto")
    assert "trainable_token_indices" not in json.loads((tmp_path / "many/adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match="--embedding rows: needs"):
        export_adapter(trained_model(base, kinds=()), tmp_path / "none", embedding="rows")


def test_peft_own_adapter_merges(tmp_path: Path) -> None:
    """An adapter that PEFT itself wrote."""
    base = make_tiny(tmp_path / "base", "qwen2")
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        PeftLora(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens"]),
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    network.save_pretrained(tmp_path / "adapter")
    assert merge_main(["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (merged(TOKENS).logits - network.eval()(TOKENS).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("form", ["merged", "adapter", "longlora"])
def test_added_tokens_survive_every_form(tmp_path: Path, form: str) -> None:
    """Trained with model.vocab one above the base's rows, as with LongLoRA's tokenizer."""
    base = make_tiny(tmp_path / "base", "llama2")
    write_tokenizer(base, VOCAB)
    small = trained_model(base)
    arch = replace(small.arch, vocab=VOCAB + 1)
    rows = torch.cat((small.trained["model.embed_tokens.weight"], torch.full((1, arch.hidden), 0.5)))
    model = replace(small, arch=arch, trained={**small.trained, "model.embed_tokens.weight": rows})
    export(model, tmp_path / "out", form)
    report = verify(model, tmp_path / "out", form)
    assert report["passed"] and json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == VOCAB + 1
    if form == "merged":
        head = HfCheckpoint(tmp_path / "out").tensor("lm_head.weight")
        old = HfCheckpoint(base).tensor("lm_head.weight")
        assert torch.equal(head[:VOCAB], old) and torch.equal(head[VOCAB], old.double().mean(0).float())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("[PAD]") == VOCAB


def test_import_adds_a_padding_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", "llama2", dtype=torch.bfloat16)
    write_tokenizer(base, VOCAB)
    assert import_main([str(base), str(tmp_path / "out"), "--pad-token", "[PAD]"]) == 0
    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert network.config.vocab_size == VOCAB + 1 == len(network.get_output_embeddings().weight)
    assert tokenizer.pad_token_id == VOCAB and tokenizer("[PAD]", add_special_tokens=False)["input_ids"] == [VOCAB]
    old = HfCheckpoint(base).tensor("model.embed_tokens.weight")
    assert torch.equal(network.get_input_embeddings().weight[VOCAB], old.double().mean(0).bfloat16())
    assert import_main([str(tmp_path / "out"), str(tmp_path / "again"), "--pad-token", "[PAD]"]) == 2
    assert "or one with a padding token" in capsys.readouterr().err
