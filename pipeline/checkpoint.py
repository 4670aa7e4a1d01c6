"""Checkpoints: canonical trained tensors, optimizer state, random state and a manifest, never half-written.

    <output>/checkpoints/step-000120/trained.safetensors     Hugging Face names -> fp32 masters of what trains
                                     optimizer.safetensors   <name>.exp_avg, <name>.exp_avg_sq
                                     rng-00000.safetensors   one a rank
                                     manifest.json           step, config, base model, checksums
    <output>/checkpoints/latest                              name of the newest whole folder

A folder is written under a temporary name, synced, renamed; `latest` moves last. Loading verifies checksums first and
only ever reads safetensors and JSON: nothing is executed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from parallel.collectives import any_rank
from parallel.errors import CheckpointError, ConfigError
from parallel.groups import Groups
from pipeline.manifest import (
    FORMAT,
    LATEST,
    MANIFEST,
    OPTIMIZER,
    TRAINED,
    file_sha256,
    folder_name,
    latest_checkpoint,
    read_manifest,
    step_of,
)

FREE_TO_CHANGE = (
    "output",
    "checks",
    "save.",
    "eval.",
    "parallel.",
    "train.steps",
    "train.micro_batch",
    "train.recompute",
    "train.bad_steps",
    "attention.backend",
    "attention.full_last_steps",
    "data.cache",
    "data.path",
    "data.tokenizer",
    "model.path",
)
"""Settings a resumed run may change: where things live and how fast they run, never what is computed. The data and the
base model are compared by content (fingerprint, base hash), so that a folder may move."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory."""

    step: int
    """Optimizer steps done."""
    trained: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor] | None
    """This rank's generators; None when the checkpoint was written by fewer ranks."""
    manifest: dict[str, Any]


def _sync(path: Path) -> None:
    """Force a file's or folder's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


class CheckpointStore:
    """Reads and writes the checkpoints of one run.

    Args:
        folder: `<output>/checkpoints`.
        keep: newest checkpoints kept.
        groups: every rank writes its own random state; rank 0 writes the rest.
    """

    def __init__(self, folder: Path, keep: int, groups: Groups) -> None:
        self.folder, self.keep, self.groups = folder, keep, groups

    def save(
        self,
        step: int,
        trained: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        rng: Mapping[str, torch.Tensor],
        manifest: Mapping[str, Any],
    ) -> Path:
        """Write checkpoint `step`; collective. Returns its folder.

        Raises:
            CheckpointError: the disk refused; earlier checkpoints are untouched.
        """
        final = self.folder / folder_name(step)
        temporary = self.folder / f".writing-{final.name}"
        failure: OSError | SafetensorError | None = None
        if self.groups.is_main:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True, mode=0o700)
                save_file({k: v.detach().cpu().contiguous() for k, v in trained.items()}, temporary / TRAINED)
                save_file({k: v.detach().cpu().contiguous() for k, v in optimizer.items()}, temporary / OPTIMIZER)
            except (OSError, SafetensorError) as error:
                failure = error
        self.groups.barrier()
        if temporary.is_dir():
            try:
                save_file(dict(rng), temporary / f"rng-{self.groups.env.rank:05d}.safetensors")
            except (OSError, SafetensorError) as error:
                failure = error
        failed = self._any(failure is not None)
        if self.groups.is_main and not failed:
            try:
                self._publish(temporary, final, {"format": FORMAT, "step": step, **manifest})
            except OSError as error:
                failure = error
        if failed or self._any(failure is not None):
            shutil.rmtree(temporary, ignore_errors=True)
            reason = failure or "another rank failed"
            raise CheckpointError(
                f"{final}: could not be written ({reason}); free space or fix permissions, and rerun."
            )
        return final

    def _any(self, flag: bool) -> bool:
        return any_rank(self.groups.everyone, flag, self.groups.device)

    def _publish(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Checksums, manifest, sync, rename, `latest`, then forget old checkpoints."""
        files = sorted(path for path in temporary.iterdir())
        manifest["files"] = {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for path in (*files, temporary / MANIFEST, temporary):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(self.folder)
        _write_text(self.folder / LATEST, final.name + "\n")
        whole = [path for path in self.folder.iterdir() if step_of(path.name) is not None]
        for old in sorted(whole, key=lambda path: step_of(path.name) or 0)[: -self.keep]:
            if old != final:
                shutil.rmtree(old)

    def latest(self) -> Path | None:
        """Folder of the newest whole checkpoint, or None for a run that has none.

        Raises:
            CheckpointError: `latest` names a folder that is not there.
        """
        return latest_checkpoint(self.folder)


def load_snapshot(folder: Path, rank: int) -> Snapshot:
    """Verify and read a checkpoint for `rank`; see `read_manifest` for the errors."""
    manifest = read_manifest(folder)
    rng_file = folder / f"rng-{rank:05d}.safetensors"
    return Snapshot(
        step=int(manifest["step"]),
        trained=load_file(folder / TRAINED),
        optimizer=load_file(folder / OPTIMIZER),
        rng=load_file(rng_file) if rng_file.name in manifest["files"] else None,
        manifest=manifest,
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested config dict."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def check_resumable(manifest: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue a run under settings that change what is computed.

    Args:
        manifest: of the checkpoint; holds `config` (nested), `base_hash`, `data_fingerprint`.
        current: the same three keys for this run.

    Raises:
        ConfigError: names the first setting that differs, both values, and the way out.
    """
    for key, noun in (("base_hash", "base model"), ("data_fingerprint", "training data")):
        if manifest.get(key) != current[key]:
            raise ConfigError(
                f"Resume: the {noun} is not the one the checkpoint was trained on ({key} differs); restore it, or "
                "choose another output folder."
            )
    old, new = flatten(manifest["config"]), flatten(current["config"])
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE):
            raise ConfigError(
                f"Resume: {key} was {old.get(key)!r} in the checkpoint and is {new.get(key)!r} now, which changes what "
                "is computed; restore it, or choose another output folder."
            )
    if old.get("train.schedule") == "cosine" and old.get("train.steps") != new.get("train.steps"):
        raise ConfigError(
            f"Resume: train.steps was {old['train.steps']} and is {new['train.steps']} now, which bends a cosine "
            "schedule half-way; keep it, or choose another output folder."
        )
