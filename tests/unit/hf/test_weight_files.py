"""Which files are the model, as transformers takes them; two sets are told apart, and pointers are told as such."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parallel.errors import CheckpointError, ConfigError, DataError, LongspanError
from pipeline.data.discovery import find_texts
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.companions import check_companions, tokenizer_size
from pipeline.hf.weight_files import INDEX, SINGLE, choose_weights
from pipeline.planning.arch import read_arch
from pipeline.planning.tensors import hf_tensor_shapes
from pipeline.preflight.files import check_model
from pipeline.storage.json_file import read_object
from pipeline.storage.lfs import is_pointer
from pipeline.storage.pickled import read_pickled
from tests.support.tiny_models import make_tiny
from tools.import_hf import import_model
from tools.preflight import weights_bytes

NORM = "model.norm.weight"
# As `git lfs pointer` writes one (docs/spec.md of git-lfs).
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def shard(folder: Path, add: float = 0.0, count: int = 2) -> list[str]:
    """Beside the single file: its tensors plus `add`, in shards with an index; their names."""
    tensors = {name: tensor + add for name, tensor in load_file(folder / SINGLE).items()}
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


def refused(read: Callable[[], object], kind: type[LongspanError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        read()
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_shards_beside_another_single_file(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    single = load_file(base / SINGLE)
    files = shard(base, 1.0)
    # What transformers does with both: it takes the single file, so the index alone must not decide.
    theirs = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert torch.equal(theirs[NORM], single[NORM])
    for gone in ((), files[:1]):
        for file in gone:
            (base / file).unlink()
        said = refused(lambda: HfCheckpoint(base))
        assert f"holds both {SINGLE} and shards that {INDEX} names ({files[len(gone)]})" in said
        assert refused(lambda: import_model(base, tmp_path / "out")) == said and not (tmp_path / "out").exists()
        assert check_model(base, weights_bytes)[0].problem == said
    # No shard is left: the single file is the model, for transformers too, and the user is told.
    (base / files[1]).unlink()
    found = HfCheckpoint(base)
    assert found.files == (SINGLE,) and torch.equal(found.tensor(NORM), theirs[NORM])
    assert (
        len(found.warnings) == 1 and f"{INDEX}: is stale, its 2 shards are gone; {SINGLE} is read" in found.warnings[0]
    )
    finding = check_model(base, weights_bytes)[0]
    assert not finding.problem and finding.advice == found.warnings
    # An index that names the single file is a plain one.
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(single, SINGLE)}))
    assert HfCheckpoint(base).files == (SINGLE,) and not HfCheckpoint(base).warnings


def test_what_else_lies_beside_the_weights(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    files = shard(base, 1.0)
    (base / SINGLE).rename(base / "consolidated.safetensors")  # Mistral's own format, beside most of its releases
    (base / "pytorch_model.bin").touch()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: "pytorch_model.bin"}}))
    theirs = AutoModelForCausalLM.from_pretrained(base).state_dict()
    found = HfCheckpoint(base)
    assert found.files == tuple(files) and not found.warnings and torch.equal(found.tensor(NORM), theirs[NORM])
    (base / "model-00003-of-00003.safetensors").touch()
    (base / "adapter_model.safetensors").touch()
    (warning,) = choose_weights(base).warnings
    assert "adapter_model.safetensors and 1 other files: not read" in warning
    for path in (*base.glob("model*"), *base.glob("adapter*")):
        path.unlink()
    assert "consolidated.safetensors, the publisher's own format" in refused(lambda: HfCheckpoint(base))


def test_a_tensor_that_zero3_left_empty(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    tensors = load_file(base / SINGLE)
    save_file({**tensors, NORM: torch.zeros(0)}, base / SINGLE)
    arch = read_arch(base)
    said = refused(lambda: HfCheckpoint(base).check(hf_tensor_shapes(arch)))
    assert NORM in said and "ZeRO-3 without gathering" in said and "zero_to_fp32" in said


def test_pointers_are_told_for_every_file_that_is_read(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2", tokenizer=True)
    (tmp_path / "gguf").mkdir()

    def at(path: Path, read: Callable[[], object], kind: type[LongspanError] = CheckpointError) -> None:
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(POINTER)
        said = refused(read, kind)
        assert f"{path}: is a Git LFS pointer" in said and "git lfs pull" in said, said
        path.unlink()
        if before is not None:
            path.write_bytes(before)

    def whole() -> None:
        HfCheckpoint(base).check(hf_tensor_shapes(read_arch(base)))

    whole()
    at(base / SINGLE, whole)
    at(base / "config.json", whole, ConfigError)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt"):
        at(base / name, whole)
    at(base / "longspan_hashes.json", HfCheckpoint(base).recorded)
    at(base / "tokenizer.json", lambda: tokenizer_size(base))
    at(tmp_path / "m.model", lambda: tokenizer_size(tmp_path / "m.model"))
    at(tmp_path / "gguf/m.gguf", lambda: import_model(tmp_path / "gguf", tmp_path / "out"))
    at(tmp_path / "trainable_params.bin", lambda: read_pickled(tmp_path / "trainable_params.bin"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("words")
    for name in ("a.txt", "b.jsonl", "c.json.gz", "d.parquet", "e.bin", "f.zst"):
        at(tmp_path / "text" / name, lambda: find_texts(tmp_path / "text"), DataError)
    shard(base)
    (base / SINGLE).unlink()
    at(base / INDEX, whole)
    # A text about pointers is none, nor is one that is longer than a pointer may be.
    assert is_pointer(POINTER) and not is_pointer(POINTER[:43]) and not is_pointer(POINTER + b"x" * 1024)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xef\xbb\xbf{}", "starts with a byte order mark; save it as UTF-8 without one"),
        ("{}".encode("utf-16"), "starts with a byte order mark"),
        (b'{"a": 1', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b'{"a": "\xe9"}', "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "does not hold a JSON object"),
    ],
)
def test_damaged_json_beside_a_model(tmp_path: Path, data: bytes, words: str) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "chat_template.json"):
        (base / name).write_bytes(data)
        said = refused(lambda: check_companions(base))
        assert said.startswith(f"{base / name}: ") and words in said
        # Before training: by the preflight, and by whatever opens a base.
        assert check_model(base, weights_bytes)[0].problem == said
        (base / name).unlink()
    assert not check_model(base, weights_bytes)[0].problem
    config = (base / "config.json").read_bytes()
    (base / "config.json").write_bytes(data)
    assert words in check_model(base, weights_bytes)[0].problem
    (base / "config.json").write_bytes(config)
    (base / INDEX).write_bytes(data)
    assert words in refused(lambda: HfCheckpoint(base))
    assert words in refused(lambda: read_object(base / INDEX))


def test_choosing_needs_no_torch() -> None:
    code = "import sys, pipeline.hf.weight_files, pipeline.hf.companions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
