"""Recorded hashes of a model's weights, and what to compare a folder with before trusting it.

`longspan_hashes.json` is written by every import and merged export: SHA-256 of each weight file and of each tensor's
bytes. A folder downloaded with huggingface_hub tells the files' SHA-256 too, in its cache's metadata or as the name of
the blob a link points to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from parallel.errors import CheckpointError
from pipeline.storage.json_file import read_object, write_json

HASHES = "longspan_hashes.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Hashes:
    """What was recorded of a folder; empty where nothing was."""

    files: Mapping[str, str] = field(default_factory=dict)
    """File name -> SHA-256 of the file."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> SHA-256 of its bytes."""
    source: str = "nothing recorded"
    """Where this was found, for reports."""


def write_hashes(folder: Path, files: Mapping[str, str], tensors: Mapping[str, str]) -> None:
    """Record hashes beside the weights."""
    write_json(folder / HASHES, {"format": 1, "files": dict(files), "tensors": dict(tensors)})


def read_hashes(folder: Path, files: tuple[str, ...]) -> Hashes:
    """What is recorded of these weight files: ours, else huggingface_hub's.

    Raises:
        CheckpointError: our file is damaged.
    """
    path = folder / HASHES
    if path.is_file():
        try:
            found = read_object(path)
            groups = [{str(k): str(v) for k, v in found[key].items()} for key in ("files", "tensors")]
            if found["format"] != 1 or not all(_SHA256.fullmatch(v) for group in groups for v in group.values()):
                raise ValueError("not format 1")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: is damaged ({error}); import the model again, or remove the file to load unchecked."
            ) from None
        return Hashes(groups[0], groups[1], HASHES)
    digests = {file: digest for file in files if (digest := _hub_digest(folder, file)) is not None}
    return Hashes(digests, {}, "huggingface_hub's download") if digests else Hashes()


def _hub_digest(folder: Path, file: str) -> str | None:
    """SHA-256 that the hub told of a file when it was downloaded."""
    blob = (folder / file).resolve()
    if (folder / file).is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    note = folder / ".cache/huggingface/download" / f"{file}.metadata"
    if note.is_file():
        lines = note.read_text(encoding="utf-8", errors="replace").split()
        # commit, etag, time; the etag of a large file is its SHA-256.
        if len(lines) >= 2 and _SHA256.fullmatch(lines[1]):
            return lines[1]
    return None
