"""Conversions that meet damage or are interrupted: the fault is named, finished shards are kept, nothing is half."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from parallel.errors import CheckpointError
from pipeline.data.tokenizer import load_tokenizer
from pipeline.export.formats import FORMATS, export, export_merged
from pipeline.export.trained_model import load_trained_model
from pipeline.export.verify import verify
from pipeline.hf import writer
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.companions import add_pad_token, tokenizer_size
from pipeline.hf.hashes import HASHES
from pipeline.hf.writer import new_folder, write_safetensors_sharded
from pipeline.storage.safetensors import SafetensorsFile, TensorFact, Written, tensor_digest
from tests.integration.test_import_export import trained_model, write_checkpoint
from tests.support.tiny_models import make_tiny
from tools import import_hf
from tools.import_hf import import_model
from tools.support import sources

SHARD = 40_000


def imported(folder: Path, kind: str = "llama2", **over: Any) -> Path:
    """A tiny model imported into several shards, with recorded hashes."""
    import_model(make_tiny(folder / "source", kind, **over), folder / "model", shard_bytes=SHARD)
    return folder / "model"


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_import_records_hashes_and_changes_no_bit(tmp_path: Path) -> None:
    model = imported(tmp_path)
    tensors, told = load_file(tmp_path / "source/model.safetensors"), json.loads((model / HASHES).read_text())
    assert told["tensors"] == {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    checkpoint = HfCheckpoint(model)
    assert len(checkpoint.files) > 3 and checkpoint.digests() == told["files"]


@pytest.mark.parametrize("where", [-3, 40, 12])
def test_flipped_bits_are_found_and_named(tmp_path: Path, where: int) -> None:
    model = imported(tmp_path)
    path = model / "model-00002-of-00006.safetensors"
    if not path.exists():
        path = sorted(model.glob("model-00002*"))[0]
    last = list(SafetensorsFile(path).facts)[-1]
    flip(path, where)
    with pytest.raises(CheckpointError) as caught:
        HfCheckpoint(model).base_hash()
    message = str(caught.value)
    assert path.name in message and message.endswith(".")
    if where < 0:
        assert f"tensor {last} changed" in message and "does not match the SHA-256 in longspan_hashes.json" in message
    with pytest.raises(CheckpointError, match=path.name):
        import_model(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_hashes_the_hub_told_are_checked(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "blob", "llama2")
    weights = base / "model.safetensors"
    digest = writer.sha256_of(weights)
    note = base / ".cache/huggingface/download/model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'a' * 40}\n{digest}\n1700000000.0\n")
    assert HfCheckpoint(base).recorded().files == {"model.safetensors": digest}
    import_model(base, tmp_path / "good")
    flip(weights, -1)
    with pytest.raises(CheckpointError, match=r"huggingface_hub's download \(which tensor is not recorded"):
        import_model(base, tmp_path / "bad")
    # The other form: the shared cache, where a link points to a blob of that name.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    shutil.copytree(base, snapshot)
    shutil.rmtree(snapshot / ".cache")
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / digest)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    with pytest.raises(CheckpointError, match="huggingface_hub"):
        HfCheckpoint(snapshot).base_hash()


def test_truncation_names_the_tensor_cut_off(tmp_path: Path) -> None:
    model = imported(tmp_path)
    path = sorted(model.glob("*.safetensors"))[1]
    file = SafetensorsFile(path)
    last = list(file.facts)[-1]
    os.truncate(path, path.stat().st_size - file.facts[last].nbytes // 2)
    with pytest.raises(CheckpointError, match=f"{path.name}: is truncated or damaged.*cut off in {last}"):
        HfCheckpoint(model)


def test_mixed_dtypes_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")

    def store(**change: torch.Tensor) -> None:
        merged = tensors | {name.replace("__", "."): tensor for name, tensor in change.items()}
        facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in merged.items()}
        write_safetensors_sharded(base, facts, merged.__getitem__)

    store(model__norm__weight=tensors["model.norm.weight"].float())
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: model.norm.weight is float32 where most .* bfloat16"
    ):
        import_model(base, tmp_path / "out")
    import_model(base, tmp_path / "cast", dtype="fp16")
    assert {fact.dtype for fact in HfCheckpoint(tmp_path / "cast").facts.values()} == {torch.float16}
    name = "model.layers.1.self_attn.k_proj.bias"
    bad = tensors[name].clone()
    bad[3] = float("nan")
    store(**{name.replace(".", "__"): bad})
    with pytest.raises(CheckpointError, match=f"model.safetensors: {name} holds a value that is not finite"):
        import_model(base, tmp_path / "out")
    # What is written is looked at, not what was read: fp16 made an infinity of this.
    large = tensors["lm_head.weight"].clone()
    large[5, 1] = 1e6
    store(lm_head__weight=large)
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds 9.99e\+05, more than float16 can.*--dtype bf16"):
        import_model(base, tmp_path / "out", dtype="fp16")
    assert not list(tmp_path.glob(".writing*")) and not (tmp_path / "out").exists()
    import_model(base, tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_training_that_is_not_finite_is_not_exported(tmp_path: Path, form: str, value: float) -> None:
    """In one row, which the few tokens whose logits are compared need not meet."""
    model = trained_model(make_tiny(tmp_path / "base", "llama2", dtype=torch.float16))
    for name, row in (("model.embed_tokens.weight", 77), ("model.layers.1.self_attn.v_proj.lora_B.weight", 3)):
        tensor = model.trained[name].clone()
        tensor[row] = value * torch.ones_like(tensor[row])
        wrong = replace(model, trained={**model.trained, name: tensor})
        if "lora" in name and form != "merged" and value == 1e6:
            continue  # adapters are kept in fp32
        merged = name.replace("lora_B.", "") if form == "merged" else name
        with pytest.raises(CheckpointError, match=f"^{merged}: holds a value that is not finite after training"):
            export(wrong, tmp_path / "out", form)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing*"))


class Stopped(BaseException):
    """As a signal would."""


def stop_after(count: int) -> Callable[..., Written]:
    written = []

    def write(path: Path, *args: Any) -> Written:
        if len(written) == count:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise Stopped
        written.append(path.name)
        return REAL(path, *args)

    return write


REAL = writer.write_safetensors


def test_interrupted_import_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = make_tiny(tmp_path / "source", "llama2"), tmp_path / "model"
    unfinished = tmp_path / ".writing-model"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(writer, "write_safetensors", stop_after(3))
        import_model(source, output, shard_bytes=SHARD)
    assert unfinished.is_dir() and not output.exists()
    shards = sorted(unfinished.glob("model-*.safetensors"))
    assert len(shards) == 3
    flip(shards[1], -1)  # damaged meanwhile: only the others may be kept
    done = []

    def record(path: Path, *args: Any) -> Written:
        done.append(path.name)
        return REAL(path, *args)

    monkeypatch.setattr(writer, "write_safetensors", record)
    import_model(source, output, shard_bytes=SHARD)
    everything = HfCheckpoint(output)
    assert shards[1].name in done and not {shards[0].name, shards[2].name} & set(done)
    assert len(done) == len(everything.files) - 2 and not unfinished.exists()
    everything.digests()
    tensors = load_file(source / "model.safetensors")
    assert all(torch.equal(everything.tensor(name), tensors[name]) for name in tensors)
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_another_job_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = make_tiny(tmp_path / "source", "llama2"), tmp_path / "model"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(writer, "write_safetensors", stop_after(2))
        import_model(source, output, shard_bytes=SHARD)
    import_model(source, output, dtype="bf16", shard_bytes=SHARD)
    assert {fact.dtype for fact in HfCheckpoint(output).facts.values()} == {torch.bfloat16}


def test_interrupted_merge_goes_on_and_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny(tmp_path / "base", "llama32")
    write_checkpoint(trained_model(base), tmp_path / "checkpoint")
    model = load_trained_model(tmp_path / "checkpoint")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(writer, "write_safetensors", stop_after(2))
        export_merged(model, tmp_path / "out", shard_bytes=SHARD)
    assert len(list((tmp_path / ".writing-out").glob("model-*"))) == 2
    export_merged(load_trained_model(tmp_path / "checkpoint"), tmp_path / "out", shard_bytes=SHARD)
    report = verify(model, tmp_path / "out", "merged")
    assert report["passed"] and report["tensors"]["file_hashes"] > 3
    layered = verify(model, tmp_path / "out", "merged", layerwise=True)
    assert layered["max_abs_logit_difference"] <= 1e-4 and layered["mode"] == "layer by layer"


def test_verify_names_a_tensor_that_is_wrong(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    export_merged(model, tmp_path / "out", shard_bytes=SHARD)
    path = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    flip(path, -1)
    with pytest.raises(
        CheckpointError, match=f"{path.name}: does not match.*tensor .* changed.*Do not use this export"
    ):
        verify(model, tmp_path / "out", "merged")
    assert "changed" in json.loads((tmp_path / "out/verify.json").read_text())["error"]


def test_models_too_large_for_memory_are_verified_by_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "mistral"))
    export_merged(model, tmp_path / "out")
    # A batch job's own group, below the root that a container sees.
    monkeypatch.setattr("pipeline.planner.host_memory.cgroup_free", lambda own: 100_000)
    report = verify(model, tmp_path / "out", "merged")
    assert report["mode"] == "layer by layer" and report["passed"]
    assert any("Loading by transformers as a whole: that takes about" in line for line in report["not_checked"])


def test_two_writers_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny(tmp_path / "source", "llama2")
    unfinished = tmp_path / ".writing-model"
    unfinished.mkdir()
    lock = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is writing it"):
        import_model(source, tmp_path / "model")
    os.close(lock)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="needs 0.0 GiB and the disk has 0.0"):
        import_model(source, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not unfinished.exists()


def test_export_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    run = tmp_path / "run/checkpoints"
    for step in (12, 24):
        write_checkpoint(replace(trained_model(base), step=step), run / f"step-{step:06d}")
    # Deleted after it was opened: what was opened stays readable.
    model = load_trained_model(run / "step-000012")
    shutil.rmtree(run / "step-000012")
    export_merged(model, tmp_path / "out")
    assert verify(model, tmp_path / "out", "merged")["passed"]
    # Deleted between reading `latest` and opening: the newer one is taken.
    (run / "latest").write_text("step-000024\n")
    answers = iter([run / "step-000012"])
    real = sources.find_checkpoint
    monkeypatch.setattr(sources, "find_checkpoint", lambda folder: next(answers, None) or real(folder))
    arguments = ["--run", str(tmp_path / "run"), "--output", str(tmp_path / "second"), "--no-verify"]
    from tools.export_hf import main

    assert main(arguments) == 0 and (tmp_path / "second/adapter_model.safetensors").is_file()


def test_generation_settings_come_along(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    (base / "generation_config.json").write_text(json.dumps({"max_length": 64, "eos_token_id": [2, 5], "top_p": 0.9}))
    export_merged(trained_model(base), tmp_path / "out")
    told = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert told == {"max_length": 256, "eos_token_id": [2, 5], "top_p": 0.9}


def test_padding_token_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words to learn from"] * 20),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    before = load_tokenizer(tmp_path)
    assert tokenizer_size(tmp_path) == before.vocab_size
    assert add_pad_token(tmp_path, "[PAD]") and not add_pad_token(tmp_path, "[PAD]")
    after = load_tokenizer(tmp_path)
    assert after.vocab_size == before.vocab_size + 1
    assert after.fingerprint == before.fingerprint, "no text becomes the added token"
    assert after.encode("some words") == before.encode("some words")
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"[PAD]": before.vocab_size}
    assert import_hf.tokenizer_size(tmp_path) == after.vocab_size


def test_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target, False) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    target.mkdir()
    (target / "precious.txt").touch()
    with pytest.raises(CheckpointError, match="is no earlier export or import"), new_folder(target, True):
        pass
    assert (target / "precious.txt").exists() and len(list(tmp_path.iterdir())) == 1
