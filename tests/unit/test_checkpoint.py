"""Checkpoints: damage is named in a sentence, a failed write leaves the earlier ones, the oldest are forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.errors import CheckpointError
from pipeline.checkpoint import CheckpointStore, load_snapshot
from pipeline.manifest import latest_checkpoint, read_manifest
from tests.single import single_groups

TENSORS = {"model.norm.weight": torch.arange(6.0), "model.embed_tokens.weight": torch.randn(4, 3)}


def save(folder: Path, *steps: int, keep: int = 9) -> Path:
    """Checkpoints of `steps` in `folder`; returns the last."""
    store = CheckpointStore(folder, keep, single_groups())
    moments = {f"{name}.exp_avg": tensor + 1 for name, tensor in TENSORS.items()}
    for step in steps:
        last = store.save(step, TENSORS, moments, {"cpu": torch.get_rng_state()}, {"config": {}, "base_hash": "b"})
    return last


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7)
    found = load_snapshot(folder, 0)
    assert found.step == 7 and found.manifest["base_hash"] == "b"
    assert found.trained.keys() == TENSORS.keys()
    assert all(torch.equal(found.trained[name], tensor) for name, tensor in TENSORS.items())
    assert torch.equal(found.optimizer["model.norm.weight.exp_avg"], TENSORS["model.norm.weight"] + 1)
    assert found.rng is not None and torch.equal(found.rng["cpu"], torch.get_rng_state())
    assert load_snapshot(folder, 1).rng is None
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "rng-00000.safetensors"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    folder = save(tmp_path, 1)
    damage(folder / file)
    with pytest.raises(CheckpointError) as refused:
        load_snapshot(folder, 0)
    message = str(refused.value)
    assert message.startswith(f"{folder / file}: ") and "resume from another" in message and "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"format": 1, "step": 1, "files": []}',
        '{"format": 1, "step": 1, "files": {"trained.safetensors": 3}}',
        '{"format": 2, "step": 1, "files": {}}',
        '{"format": 1, "step": -1, "files": {}}',
        '{"format": 1, "step": "1", "files": {}}',
    ],
)
def test_a_nonsense_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError) as refused:
        read_manifest(folder)
    assert str(refused.value).startswith(f"{folder / 'manifest.json'}: ") and "\n" not in str(refused.value)


def test_a_manifest_may_not_reach_outside_nor_omit_the_weights(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["files"].pop("trained.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"trained\.safetensors: is missing"):
        read_manifest(folder)
    (folder / "trained.safetensors").rename(tmp_path / "trained.safetensors")
    manifest["files"]["../trained.safetensors"] = facts
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"\.\./trained\.safetensors: is missing"):
        read_manifest(folder)


def test_latest_pointing_nowhere_is_an_error_and_absent_is_a_fresh_start(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    folder = save(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == folder
    for name in ("step-000099", "../elsewhere", ""):
        (tmp_path / "latest").write_text(name + "\n")
        with pytest.raises(CheckpointError, match="not a checkpoint beside it") as refused:
            latest_checkpoint(tmp_path)
        assert str(refused.value).startswith(f"{tmp_path / 'latest'}: ")


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")  # also stops a root user
    with pytest.raises(CheckpointError) as refused:
        save(tmp_path / "checkpoints", 3)
    assert str(tmp_path / "checkpoints" / "step-000003") in str(refused.value)
    assert "could not be written" in str(refused.value)


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == first and load_snapshot(first, 0).step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
    assert save(tmp_path, 2).name == "step-000002"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 999_998, 999_999, 1_000_000, keep=2)  # names of other lengths sort by number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1000000", "step-999999"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"
