"""What a checkpoint folder declares, and proof that it is whole. Without torch: exports and inspection start with it.

See `pipeline.checkpoint` for the layout.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError

FORMAT = 1
TRAINED, OPTIMIZER, MANIFEST, LATEST = "trained.safetensors", "optimizer.safetensors", "manifest.json", "latest"


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Optimizer steps done at the checkpoint of this folder name; None of other names."""
    match = re.fullmatch(r"step-(\d{6,})", name)
    return int(match.group(1)) if match else None


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latest_checkpoint(folder: Path) -> Path | None:
    """Newest whole checkpoint below `<output>/checkpoints`, or None.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    target = folder / name
    if step_of(name) is None or not target.is_dir():
        raise CheckpointError(
            f"{pointer}: names {name!r}, which is not a checkpoint beside it; write the name of one that is, or remove "
            f"{folder} to start over."
        )
    return target


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and verify every file against it.

    Raises:
        CheckpointError: the manifest or a file is missing, damaged or of another format; the file is named.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, step = manifest["format"], manifest["step"]
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is not a checkpoint manifest ({type(error).__name__}: {error}); resume from another checkpoint."
        ) from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: has format {version}, this Longspan reads {FORMAT}; use the matching release.")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: has step {step!r}, which is not a count; resume from another checkpoint.")
    for name, (size, digest) in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: is missing from the checkpoint; resume from another one.")
        if file.stat().st_size != size or file_sha256(file) != digest:
            raise CheckpointError(f"{file}: does not match its checksum (damaged); resume from another checkpoint.")
    for name in (TRAINED, OPTIMIZER):
        if name not in files:
            raise CheckpointError(f"{folder / name}: is missing from the checkpoint; resume from another one.")
    return dict(manifest)
