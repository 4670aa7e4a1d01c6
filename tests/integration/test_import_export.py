"""Folders in and out: damaged ones are named, written ones load in transformers and PEFT with the right logits."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LORA_TARGETS, LoraConfig
from pipeline.export.adapter_write import peft_config
from pipeline.export.formats import export, export_adapter, export_merged
from pipeline.export.trained_model import TrainedModel, load_trained_model
from pipeline.export.verify import sample_tokens, verify
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.writer import plan_shards, write_safetensors_sharded
from pipeline.planning.arch import read_arch
from pipeline.planning.rope import plan_rope
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes, is_derived
from pipeline.storage.safetensors import TensorFact
from tests.support.tiny_models import KINDS, make_tiny
from tools.export_hf import main as export_main
from tools.import_hf import import_model
from tools.import_hf import main as import_main

CONTEXT = 256
MLP = ("gate", "up", "down")
TARGETS = {p: f"self_attn.{p}_proj" for p in "qkvo"} | {p: f"mlp.{p}_proj" for p in MLP}


def trained_tensors(base: Path, lora: LoraConfig, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Random changes to everything of `kinds`, with LoRA's B far from zero."""
    arch = read_arch(base)
    generator = torch.Generator().manual_seed(7)
    changed = {}
    for name, shape in adapter_shapes(arch, lora).items():
        changed[name] = torch.randn(shape, generator=generator) * 0.15
    for name, tensor in load_file(base / "model.safetensors").items():
        kind = "embed" if "embed" in name else "norm" if "norm" in name else "lm_head" if "lm_head" in name else ""
        if kind in kinds:
            changed[name] = tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)
    return changed


def trained_model(
    base: Path,
    lora: LoraConfig | None = None,
    kinds: tuple[str, ...] = ("embed", "norm"),
    rope: RopeSettings | None = None,
) -> TrainedModel:
    lora = lora or LoraConfig(rank=4, alpha=8.0)
    arch = read_arch(base)
    forced = rope or RopeSettings(type="linear", original_context=64)
    plan = plan_rope(arch, forced, CONTEXT)
    return TrainedModel(
        base, HfCheckpoint(base).base_hash(), arch, plan, CONTEXT, lora, trained_tensors(base, lora, kinds), 12
    )


def by_hand(model: TrainedModel, scale: float, tokens: torch.Tensor, factor: float = 4.0) -> torch.Tensor:
    """Logits of transformers' model with linear scaling set and weights merged here, without our export code."""
    config = AutoConfig.from_pretrained(model.base)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    network = AutoModelForCausalLM.from_pretrained(model.base, config=config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in model.trained:
                parameter.copy_(model.trained[name])
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.weight" in model.trained:
                low, high = model.trained[f"{stem}.lora_A.weight"], model.trained[f"{stem}.lora_B.weight"]
                parameter += scale * high @ low
        return network(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_adapter_give_the_merged_logits(tmp_path: Path, kind: str) -> None:
    base = make_tiny(tmp_path / "base", kind, tokenizer=True)
    model = trained_model(base)
    tokens = sample_tokens(model.arch.vocab, 48)
    want = by_hand(model, 2.0, tokens)
    assert (want - AutoModelForCausalLM.from_pretrained(base)(tokens).logits).abs().max() > 0.1
    for form in ("merged", "adapter"):
        folder = tmp_path / form
        export(model, folder, form)
        config = AutoConfig.from_pretrained(folder)
        assert config.max_position_embeddings == CONTEXT
        if form == "merged":
            network: Any = AutoModelForCausalLM.from_pretrained(folder)
        else:
            network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, config=config), folder)
        with torch.no_grad():
            difference = (network.eval()(tokens).logits - want).abs().max().item()
        assert difference <= 1e-5 * max(1.0, want.abs().max().item())
        assert verify(model, folder, form, tokens)["passed"]
        assert json.loads((folder / "verify.json").read_text())["max_abs_logit_difference"] <= 1e-4
        assert AutoTokenizer.from_pretrained(folder).encode("ab") == AutoTokenizer.from_pretrained(base).encode("ab")
        assert AutoTokenizer.from_pretrained(folder).model_max_length == CONTEXT


@pytest.mark.parametrize("kind", ["llama3", "smollm2"])
@pytest.mark.parametrize(
    ("lora", "kinds", "scale"),
    [
        (LoraConfig(rank=4, alpha=6.0, rslora=True, targets=LORA_TARGETS), ("embed", "norm", "lm_head"), 3.0),
        (LoraConfig(rank=2, alpha=2.0, targets=("v", "down")), (), 1.0),
        (LoraConfig(rank=2, alpha=2.0), ("norm",), 1.0),
    ],
    ids=["rslora, everything", "lora only", "lora and norms"],
)
def test_other_adapters(tmp_path: Path, kind: str, lora: LoraConfig, kinds: tuple[str, ...], scale: float) -> None:
    model = trained_model(make_tiny(tmp_path / "base", kind), lora, kinds)
    tokens = sample_tokens(model.arch.vocab)
    want = by_hand(model, scale, tokens)
    export_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS[part].split(".")[-1] for part in lora.targets)
    network = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(
            config["base_model_name_or_path"], config=AutoConfig.from_pretrained(tmp_path / "adapter")
        ),
        tmp_path / "adapter",
    ).eval()
    with torch.no_grad():
        assert (network(tokens).logits - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
        # What a user does next: merging in PEFT must keep the logits, tied output weights included.
        merged = network.merge_and_unload()
        assert (merged(tokens).logits - want).abs().max() <= 2e-5 * max(1.0, want.abs().max().item())


def test_bf16_base_stays_bf16_in_shards(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "tinyllama", dtype=torch.bfloat16)
    model = trained_model(base)
    export_merged(model, tmp_path / "merged", shard_bytes=40_000)
    out, source = HfCheckpoint(tmp_path / "merged"), load_file(base / "model.safetensors")
    assert len(out.files) > 3 and out.dtype is torch.bfloat16
    # Where no arithmetic happened the bits are the base's.
    untouched = [
        n for n in source if n not in model.trained and n.replace(".weight", ".lora_A.weight") not in model.trained
    ]
    assert untouched and all(torch.equal(out.tensor(name), source[name]) for name in untouched)
    name = "model.layers.1.self_attn.v_proj"
    delta = 2.0 * model.trained[f"{name}.lora_B.weight"] @ model.trained[f"{name}.lora_A.weight"]
    assert torch.equal(out.tensor(f"{name}.weight"), (source[f"{name}.weight"].float() + delta).bfloat16())
    assert verify(model, tmp_path / "merged", "merged")["passed"]
    export_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert stored["base_model.model.model.norm.weight"].dtype is torch.bfloat16
    assert stored[f"base_model.model.{name}.lora_A.weight"].dtype is torch.float32


def test_verify_fails_on_a_wrong_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "smollm2"))
    export_merged(model, tmp_path / "out")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"] = config["rope_parameters"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="RoPE is of type 'default', and the model was trained with linear"):
        verify(model, tmp_path / "out", "merged")
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="logits differ from the trained"):
        for check in ("verify.compare_tensors", "verify.check_config", "verify_logits.check_rotary"):
            patch.setattr(f"pipeline.export.{check}", lambda *_: {})
        verify(model, tmp_path / "out", "merged")
    assert json.loads((tmp_path / "out/verify.json").read_text())["passed"] is False
    export_merged(model, tmp_path / "out", force=True)
    with pytest.raises(CheckpointError, match="logits differ"):
        verify(model, tmp_path / "out", "merged", reference=lambda tokens: torch.full((2, 32, 128), float("nan")))


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    only_norms = {name: tensor for name, tensor in model.trained.items() if "lora" not in name}
    with pytest.raises(CheckpointError, match="holds no LoRA adapters"):
        peft_config(replace(model, trained=only_norms))
    one_layer = {n: t for n, t in model.trained.items() if n != "model.layers.0.input_layernorm.weight"}
    with pytest.raises(CheckpointError, match="trained in 1 of 2 layers"):
        peft_config(replace(model, trained=one_layer))
    half = {n: t for n, t in model.trained.items() if n != "model.layers.0.self_attn.q_proj.lora_B.weight"}
    with pytest.raises(CheckpointError, match="lora_B.weight: is missing beside"):
        replace(model, trained=half)
    with pytest.raises(CheckpointError, match="has shape"):
        replace(model, trained={"model.norm.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="no place for it"):
        replace(model, trained={"model.foo.weight": torch.zeros(3)})
    with pytest.raises(ConfigError, match="'gguf' is not one of adapter, merged"):
        export(model, tmp_path / "x", "gguf")


def write_checkpoint(model: TrainedModel, folder: Path) -> Path:
    """A checkpoint folder as pipeline.checkpoint writes it."""
    folder.mkdir(parents=True)
    save_file(dict(model.trained), folder / "trained.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "optimizer.safetensors")
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in folder.iterdir()
    }
    config = {
        "model": {"path": str(model.base), "context": CONTEXT, "rope": {"type": "linear", "original_context": 64}},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q", "k", "v", "o"], "rslora": False},
    }
    manifest = {"format": 1, "step": model.step, "config": config, "files": files}
    manifest |= {"base": str(model.base), "base_hash": model.base_hash}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_settings_an_earlier_release_ignored_do_not_stop_an_export(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(trained_model(make_tiny(tmp_path / "base", "smollm2")), tmp_path / "step-000012")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["config"]["model"]["rope"] = {"type": "ntk", "theta": 5e5, "factor": 50.0, "original_context": 64}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert load_trained_model(checkpoint).rope.theta == 5e5


def test_command_line_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "smollm2"))
    checkpoint = write_checkpoint(model, tmp_path / "run/checkpoints/step-000012")
    (tmp_path / "run/checkpoints/latest").write_text("step-000012\n")
    loaded = load_trained_model(checkpoint)
    assert (loaded.rope, loaded.lora, loaded.step) == (model.rope, model.lora, 12)
    run, out = ["--run", str(tmp_path / "run")], ["--output", str(tmp_path / "out")]
    assert export_main([*run, *out, "--format", "merged"]) == 0
    assert "verified" in capsys.readouterr().out
    assert export_main([*run, *out, "--format", "merged"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert export_main([*run, *out, "--force", "--no-verify"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "longspan.json",
    ]
    assert "AutoConfig.from_pretrained" in (tmp_path / "out/README.md").read_text()
    assert export_main([*run, "--output", str(tmp_path / "base"), "--force"]) == 2
    assert "overlaps the base" in capsys.readouterr().err
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert export_main([*run, *out, "--force", "--no-verify"]) == 2
    assert "say where it lies with --base" in capsys.readouterr().err
    assert export_main([*run, *out, "--force", "--no-verify", "--base", str(tmp_path / "moved")]) == 0
    other = make_tiny(tmp_path / "other", "smollm2", seed=1)
    assert export_main([*run, *out, "--force", "--base", str(other)]) == 2
    assert "is not the base" in capsys.readouterr().err
    assert export_main(["--run", str(tmp_path / "moved"), *out]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_import_normalizes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", "llama3", tokenizer=True)
    assert import_main([str(base), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    out = HfCheckpoint(tmp_path / "out")
    assert {fact.dtype for fact in out.facts.values()} == {torch.bfloat16}
    source = load_file(base / "model.safetensors")
    assert all(torch.equal(out.tensor(name), source[name].bfloat16()) for name in source)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16
    assert (tmp_path / "out/tokenizer.json").is_file() and read_arch(tmp_path / "out") == read_arch(base)
    import_model(base, tmp_path / "kept")
    assert HfCheckpoint(tmp_path / "kept").dtype is torch.float32
    assert import_main([str(base), str(base)]) == 2
    assert "overlaps the source" in capsys.readouterr().err
    assert import_main([str(tmp_path / "no.gguf"), str(tmp_path / "x")]) == 2
    assert "no.gguf: does not exist" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    assert import_main([str(tmp_path / "bad.gguf"), str(tmp_path / "x")]) == 2
    assert "cannot read this GGUF" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def shard(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite a tiny checkpoint as several shards; returns its tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "longspan_hashes.json").unlink(missing_ok=True)
    facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors_sharded(folder, facts, tensors.__getitem__, 60_000)
    return tensors


def test_shards_round_trip_and_slices(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    whole = HfCheckpoint(base)
    tensors = shard(base)
    sharded = HfCheckpoint(base)
    assert len(sharded.files) > 2 and sharded.names == sorted(tensors) == whole.names
    assert sharded.facts == whole.facts
    for name, tensor in tensors.items():
        assert torch.equal(sharded.tensor(name), tensor)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(sharded.slice(name, 1, 8, 24), tensors[name][:, 8:24])
    assert torch.equal(sharded.slice(name, 0, 8, 24), tensors[name][8:24])
    with pytest.raises(CheckpointError, match="has no range 0:999"):
        sharded.slice(name, 0, 0, 999)
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_mixed_dtypes_load_anywhere(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5, 2), "c": torch.randn(1).half(), "d": torch.ones(())}
    facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors_sharded(tmp_path, facts, tensors.__getitem__)
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with pytest.raises(CheckpointError, match="announced as"):
        write_safetensors_sharded(tmp_path, facts, lambda name: tensors[name].double())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longspan_hashes.json", "model.safetensors"]
    assert plan_shards(facts, 40) == [["a"], ["b"], ["c", "d"]]


def test_hash_tells_weights_apart(tmp_path: Path) -> None:
    one, same, other = (make_tiny(tmp_path / str(i), "llama2", seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert HfCheckpoint(one).base_hash() == HfCheckpoint(same).base_hash() != HfCheckpoint(other).base_hash()


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    def refuse(words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            HfCheckpoint(tmp_path / "m")
        assert words in str(caught.value) and str(caught.value).endswith(".") and "\n" not in str(caught.value)

    refuse("is not a folder")
    base = make_tiny(tmp_path / "m", "llama2")
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-10])
    refuse("model.safetensors: is truncated or damaged")
    (base / "model.safetensors").write_bytes(whole[:5])
    refuse("model.safetensors: is truncated or damaged")
    (base / "model.safetensors").write_bytes(b"\xff" * 64)
    refuse("its header is longer than the file")
    (base / "model.safetensors").write_bytes(whole)
    shard(base)
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    changed = {**good["weight_map"], "model.ghost.weight": "model-00001-of-00004.safetensors"}
    first = sorted(set(good["weight_map"].values()))[0]
    changed["model.ghost.weight"] = first
    index.write_text(json.dumps({"weight_map": changed}))
    refuse(f"{first}: lacks model.ghost.weight, which the index puts there")
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    refuse("is not a usable index")
    index.write_text(json.dumps(good))
    (base / first).rename(base / "away")
    refuse(f"{first}: is missing (1 of ")
    (base / "away").rename(base / first)
    index.unlink()
    refuse("index.json: is missing, though model-00001")
    for path in base.glob("*.safetensors"):
        path.unlink()
    refuse("holds no *.safetensors file")
    (base / "pytorch_model.bin").touch()
    refuse("holds pickled weights only")
    (base / "pytorch_model.bin").unlink()
    (base / "model.gguf").touch()
    refuse("convert it first with longspan import")
    save_file({"q": torch.zeros(2, dtype=torch.int8)}, base / "model.safetensors")
    refuse("q has dtype I8, which is not a plain float")
    (base / "model.safetensors").rename(base / "adapter_model.safetensors")
    refuse("is a PEFT adapter, not a model")


def test_check_against_the_architecture(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "m", "smollm2")
    shapes = hf_tensor_shapes(read_arch(base))
    tensors = load_file(base / "model.safetensors")

    def check(**change: torch.Tensor | None) -> None:
        merged = {**tensors, **{name.replace("__", "."): tensor for name, tensor in change.items()}}
        save_file({name: t.clone() for name, t in merged.items() if t is not None}, base / "model.safetensors")
        HfCheckpoint(base).check(shapes, is_derived)

    check()
    check(lm_head__weight=tensors["model.embed_tokens.weight"])
    check(model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        check(lm_head__weight=tensors["model.embed_tokens.weight"] + 1)
    with pytest.raises(CheckpointError, match="has no tensor model.norm.weight"):
        check(model__norm__weight=None)
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight has shape \(3,\), but config.json describes \(144,\)"
    ):
        check(model__norm__weight=torch.zeros(3))
    with pytest.raises(CheckpointError, match="extra.weight is not a tensor of the model"):
        check(extra__weight=torch.zeros(3))
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        HfCheckpoint(base).tensor("nothing")
