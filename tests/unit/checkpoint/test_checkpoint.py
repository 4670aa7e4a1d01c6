"""Checkpoints on the disk: what is written is read in any cut, private, and nothing hostile is followed or executed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from parallel.errors import CheckpointError, ConfigError
from pipeline.checkpoint.choose import choose
from pipeline.checkpoint.compatibility import check_resumable, check_settings
from pipeline.checkpoint.manifest import checksum_text, manifest_bytes, read_manifest
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.tensors import whole_trained
from pipeline.storage.durable import MAX_JSON, Damaged
from tests.support.checkpoints import LORA, SHAPES, holds, state_at, write
from tests.support.tiny_models import make_tiny


def redeclare(folder: Path, change: dict[str, Any]) -> None:
    """Change a manifest as an enemy would: with a matching checksum."""
    raw = json.loads((folder / "manifest.json").read_text()) | change
    data = manifest_bytes(raw)
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sha256").write_text(checksum_text(hashlib.sha256(data).hexdigest()))


def replace(folder: Path, name: str, data: bytes) -> None:
    """Replace a file, and declare its new checksum."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    redeclare(folder, {"files": files})


def test_any_range_of_any_cut_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert holds(folder, 7)
    assert {n: tuple(t.shape) for n, t in whole_trained(folder).items()} == SHAPES
    rng = np.random.default_rng(0)
    with CheckpointReader(folder) as reader:
        assert reader.verify() == sum(facts.bytes for facts in reader.manifest.files.values())
        for name, shape in SHAPES.items():
            for _ in range(40):
                dim = int(rng.integers(len(shape)))
                low, high = sorted(rng.choice(shape[dim] + 1, 2, replace=False).tolist())
                block = np.take(state_at(7)[name]["exp_avg"], range(low, high), axis=dim).reshape(-1)
                start, stop = sorted(rng.integers(0, block.size + 1, 2).tolist())
                found = reader.read(name, "exp_avg", (dim, low, high), start, stop)
                assert np.array_equal(found, block[start:stop]), (name, dim, low, high, start, stop)
        second = reader.rng(1)
        assert second is not None and second["cpu"].tolist() == [1, 1, 1] and reader.rng(3) is None
    assert load_file(folder / "trained-00001.safetensors")[LORA].shape == (5,), "any safetensors reader opens it"
    listed = os.popen(f"cd {folder} && sha256sum -c manifest.sha256").read()
    assert listed.strip() == "manifest.json: OK"


def test_files_are_private(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "checkpoints", 1)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in [*folder.iterdir(), folder.parent / "latest"]} == {0o600}


def test_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in (4, 5, 6, 8, 9, 999_999, 1_000_000):  # names of other lengths sort by number
        write(tmp_path, step, keep=2, keep_every=4)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["latest", "step-000004", "step-000008", "step-1000000", "step-999999"]
    choice = choose(tmp_path)
    assert choice is not None and choice.step == 1_000_000 and choice.reason.startswith("the newest; 9 files")
    assert choice.warnings == ()


def test_a_fresh_folder_starts_and_a_run_without_a_whole_checkpoint_does_not_start_over(tmp_path: Path) -> None:
    assert choose(tmp_path / "none") is None
    folder = write(tmp_path, 1)
    (folder / "rng-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints is whole .*rng-00000\.safetensors: is miss"):
        choose(tmp_path)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with pytest.raises(CheckpointError, match="which is not a checkpoint beside it"):
        choose(tmp_path)


def test_a_newer_format_is_an_error_not_a_reason_to_fall_back(tmp_path: Path) -> None:
    write(tmp_path, 1)
    redeclare(write(tmp_path, 2), {"format": 3})
    with pytest.raises(CheckpointError, match="has format 3, and this Longspan reads 1 and 2"):
        choose(tmp_path)


def test_format_1_is_migrated_on_load(tmp_path: Path) -> None:
    folder, state = tmp_path / "step-000004", state_at(4)
    folder.mkdir()
    tensors = {n: {f: torch.from_numpy(a) for f, a in fields.items()} for n, fields in state.items()}
    save_file({name: fields["trained"] for name, fields in tensors.items()}, folder / "trained.safetensors")
    moments = {f"{n}.{f}": fields[f] for n, fields in tensors.items() for f in ("exp_avg", "exp_avg_sq")}
    save_file(moments | {"step": torch.tensor(3)}, folder / "optimizer.safetensors")
    save_file({"cpu": torch.zeros(4, dtype=torch.uint8)}, folder / "rng-00000.safetensors")
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 4, "config": {}, "files": files}))
    assert holds(folder, 4)
    with CheckpointReader(folder) as reader:
        reader.verify()
        assert (reader.manifest.step, reader.manifest.updates) == (4, 3)
        assert reader.manifest.layout == {"engine": "megatron", "tp": 1, "cp": 1, "pp": 1, "virtual": 1, "dp": 1}
    choice = choose(tmp_path)
    assert choice is not None and choice.step == 4
    (folder / "optimizer.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        choose(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "1"},
        {"step": True},
        {"updates": 1.5},
        {"files": []},
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"trained-00000.safetensors": {"bytes": 1, "sha256": "xyz"}}},
        {"tensors": {"a": {"shape": [1 << 70], "pieces": []}}},
        {"tensors": {"a": {"shape": [4], "pieces": [[0, None, 0, 3]]}}},
        {"tensors": {"a": {"shape": [4], "pieces": [[0, None, 0, 3], [1, None, 2, 4]]}}},
        {"tensors": {"a": {"shape": [4, 4], "pieces": [[0, [0, 0, 2], 0, 8], [1, [1, 2, 4], 0, 8]]}}},
        {"tensors": {"a": {"shape": [4], "pieces": [[77, None, 0, 4]]}}},
        {"tensors": {"a": {"shape": [4], "pieces": [["../x", None, 0, 4]]}}},
    ],
)
def test_a_hostile_manifest_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write(tmp_path, 1)
    redeclare(folder, change)
    with pytest.raises(Damaged) as refused:
        read_manifest(folder)
    assert str(refused.value).startswith(f"{folder / 'manifest.json'}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"no JSON", b"[]", b"[" * 100_000, b'{"format": NaN}', b"\xff\xfe"])
def test_a_nonsense_manifest_is_named(tmp_path: Path, data: bytes) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(Damaged, match=r"manifest\.json: is not a checkpoint manifest"):
        read_manifest(folder)


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip bomb", "long header", "huge header", "deep header"])
def test_what_is_no_safetensors_file_is_refused_and_never_executed(tmp_path: Path, kind: str) -> None:
    folder, trap = write(tmp_path, 1), tmp_path / "executed"
    path = tmp_path / "evil"
    if kind == "torch":
        torch.save({"a": Trap(trap)}, path)
    elif kind == "zip bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("trained", b"\0" * (1 << 24))
    else:
        deep = b"[" * 100_000
        path.write_bytes(
            {
                "pickle": pickle.dumps(Trap(trap)),
                "long header": (1 << 62).to_bytes(8, "little") + b"{}",
                "huge header": (MAX_JSON + 1).to_bytes(8, "little") + b" " * 100,
                "deep header": len(deep).to_bytes(8, "little") + deep,
            }[kind]
        )
    replace(folder, "trained-00001.safetensors", path.read_bytes())
    with CheckpointReader(folder) as reader, pytest.raises(Damaged, match=r"trained-00001.* no whole safetensors"):
        reader.verify()
    with CheckpointReader(folder) as reader, pytest.raises(Damaged):
        reader.whole(LORA)
    assert not trap.exists()


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 1)
    target = folder / "trained-00000.safetensors"
    target.rename(tmp_path / "outside")
    target.symlink_to(tmp_path / "outside")
    with CheckpointReader(folder) as reader, pytest.raises(Damaged, match="is a link"):
        reader.verify()
    target.unlink()
    os.mkfifo(target)
    with CheckpointReader(folder) as reader, pytest.raises(Damaged, match="bytes instead of|not a plain file"):
        reader.verify()
    (tmp_path / "run" / "step-000009").symlink_to(folder)
    with pytest.raises(Damaged, match="is a link"):
        read_manifest(tmp_path / "run" / "step-000009")


def test_a_header_that_disagrees_with_the_manifest_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    other = write(tmp_path, 2)
    replace(folder, "optimizer-00001.safetensors", (other / "optimizer-00002.safetensors").read_bytes())
    with CheckpointReader(folder) as reader, pytest.raises(Damaged, match="does not hold the piece of"):
        reader.verify()
    assert math.prod(SHAPES[LORA]) == 24


CONFIG = {
    "lora": {"rank": 8},
    "attention": {"group_size": 16},
    "model": {"context": 64, "rope": {"type": "linear", "factor": 2.0}},
    "train": {"lr": 1e-4},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora": {"rank": 4}}, r"lora\.rank was 8 .* 4 now"),
        ({"attention": {"group_size": 32}}, r"attention\.group_size was 16"),
        ({"model": {"context": 64, "rope": {"type": "linear", "factor": 4.0}}}, r"model\.rope\.factor was 2\.0"),
        ({"train": {"lr": 2e-4}}, r"train\.lr was"),
        ({"train": {"lr": 1e-4, "lr_embed_norm": 2e-4}}, r"train\.lr_embed_norm was 0\.0001"),
        ({"attention": {"group_fraction": 0.5}}, r"attention\.group_size was 16 .* 32 now"),
        ({"attention": {"kind": "full"}}, r"attention\.kind was 's2'"),
        ({"data": {"sequence": 32}}, r"data\.sequence was 64 .* 32 now"),
        ({"model": CONFIG["model"] | {"context": 128}}, r"model\.context was 64"),
        (
            {"model": CONFIG["model"] | {"base": "nf4"}},
            r"model\.base was 'bf16' in the checkpoint and is 'nf4' now, .* set resume\.allow: \[model\.base\]",
        ),
    ],
)
def test_other_mathematics_are_refused(change: dict[str, Any], named: str) -> None:
    saved = {"config": CONFIG, "base_hash": "b", "data_fingerprint": "d"}
    check_resumable(saved, {**saved, "config": CONFIG | {"parallel": {"tp": 2}, "save": {"keep": 7}}})
    check_resumable(saved, {**saved, "config": CONFIG | {"data": {"mask_documents": False}}})  # a new setting's default
    with pytest.raises(ConfigError, match=named):
        check_resumable(saved, {**saved, "config": CONFIG | change})
    with pytest.raises(ConfigError, match="the base model is not the one"):
        check_resumable(saved, {**saved, "base_hash": "c"})
    with pytest.raises(ConfigError, match="the training data is not the one"):
        check_resumable(saved, {**saved, "data_fingerprint": "e"})


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({}, {"attention": {"group_size": 16}}),
        ({}, {"data": {"sequence": 64}}),
        ({}, {"train": {"lr": 1e-4, "lr_embed_norm": 1e-4}}),
        ({"attention": {"group_size": 32}}, {"attention": {"group_fraction": 0.5}}),
        # Earlier releases took these, which have no effect; the configuration can no longer be written with them.
        ({"attention": {"kind": "full", "group_size": 32}}, {"attention": {"kind": "full"}}),
        (
            {"model": {"context": 64, "rope": {"type": "ntk", "theta": 5e5, "factor": 50.0}}},
            {"model": {"context": 64, "rope": {"type": "ntk", "theta": 5e5}}},
        ),
    ],
)
def test_settings_are_compared_as_they_take_effect(saved: dict[str, Any], now: dict[str, Any]) -> None:
    plain = {key: value for key, value in CONFIG.items() if key != "attention"}
    check_settings(plain | saved, plain | now)
    check_settings(plain | now, plain | saved)


def test_model_settings_are_compared_as_the_base_makes_them(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama2", max_position_embeddings=64)

    def model(vocab: int | None = None, **rope: Any) -> dict[str, Any]:
        return {"model": {"path": str(tmp_path), "context": 128, "vocab": vocab, "rope": rope}}

    for spelled in (
        model(type="linear"),
        model(factor=2.0),
        model(original_context=64),
        model(type="linear", factor=2.0),
        model(128),
    ):
        check_settings(model(), spelled)
        check_settings(spelled, model())
    for other, named in (
        (model(type="linear", factor=4.0), "model.rope.factor was None .* 4.0 now"),
        (model(type="yarn"), "model.rope.type was 'auto'"),
        (model(131), "model.vocab was None"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_settings(model(), other)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="model.rope.type was 'auto'"):
        check_settings(model(), model(type="linear"))


def test_a_manifest_without_a_runs_configuration_is_told() -> None:
    fraction = {"model": {"context": 64}, "attention": {"group_fraction": 7.0}}
    for broken in ({}, {"model": 3}, {"model": {"context": "x"}}, fraction):
        with pytest.raises(CheckpointError, match="does not hold a run's configuration"):
            check_settings(broken, CONFIG)
