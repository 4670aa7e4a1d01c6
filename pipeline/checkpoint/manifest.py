"""What a checkpoint declares, parsed as if an enemy had written it. No torch: exports and inspection start with it.

    <output>/checkpoints/step-000120/trained-00003.safetensors    rank 3's pieces of the fp32 masters, flat
                                     optimizer-00003.safetensors  <name>.exp_avg, <name>.exp_avg_sq of the same pieces
                                     rng-00003.safetensors        rank 3's random state
                                     manifest.json                everything else; which piece lies where; checksums
                                     manifest.sha256              the manifest's own, as sha256sum writes it
    <output>/checkpoints/latest                                   name of the newest whole folder

A tensor has its Hugging Face name and whole shape. A piece is a range of the flattened `cut` (dim, start, stop) of it:
the cut is a tensor-parallel rank's slice, the range what an optimizer shard holds of that. Pieces tile the tensor, so
any layout reads what any other wrote.

Format 1 (whole tensors in trained.safetensors and optimizer.safetensors, no manifest.sha256) is read as one piece each.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from pipeline.storage.durable import ArrayFile, Damaged, FileFacts, count, parse_json, read_small

FORMAT = 2
MANIFEST, CHECKSUM, LATEST = "manifest.json", "manifest.sha256", "latest"
MASTER, MOMENTS = "trained", ("exp_avg", "exp_avg_sq")
FIELDS = (MASTER, *MOMENTS)
"""What is kept of every trained element, fp32."""
WRITING = ".writing-"
"""Prefix of a folder that is not whole yet."""
_FILE = re.compile(r"(trained|optimizer|rng)(-\d{5,})?\.safetensors")

Cut = tuple[int, int, int] | None
"""(dim, start, stop) of a whole tensor of one or two dimensions; None: all of it."""


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Optimizer steps done at the checkpoint of this folder name; None of other names."""
    match = re.fullmatch(r"step-(\d{6,18})", name)
    return int(match.group(1)) if match else None


def rank_file(kind: str, rank: int) -> str:
    """Name of a rank's file: kind is trained, optimizer or rng."""
    return f"{kind}-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Piece:
    """A range of the flattened cut of a tensor, and the files that hold it."""

    cut: Cut
    start: int
    stop: int
    trained_file: str
    optimizer_file: str


@dataclass(frozen=True)
class TensorEntry:
    """A trained tensor."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Every element once."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint as it is declared."""

    folder: Path
    format: int
    step: int
    """Optimizer steps done."""
    updates: int
    """Updates applied: steps that were not skipped."""
    tensors: dict[str, TensorEntry]
    files: dict[str, FileFacts]
    raw: dict[str, Any]
    """Everything, as JSON gave it: config, layout, base, base_hash, data_fingerprint, guard, versions, ..."""

    @property
    def layout(self) -> dict[str, Any] | None:
        """Axis sizes and engine it was written by; None if it does not say."""
        found = self.raw.get("layout")
        if self.format > 1:
            return dict(found) if isinstance(found, Mapping) else None
        parallel = self.raw.get("config", {}).get("parallel", {})
        axes = {axis: parallel.get(axis, 1) for axis in ("tp", "cp", "pp", "virtual")}
        ranks = sum(name.startswith("rng-") for name in self.files)  # each rank wrote one
        dp = ranks // max(1, axes["tp"] * axes["cp"] * axes["pp"])
        return {"engine": parallel.get("engine", "megatron"), "dp": dp, **axes}


def cut_shape(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    """Shape of a cut of a tensor."""
    found = list(shape)
    if cut is not None:
        found[cut[0]] = cut[2] - cut[1]
    return tuple(found)


def read_manifest(folder: Path) -> Manifest:
    """Parse a checkpoint's manifest, proven by its checksum; tensor files are not read (see `reader`).

    Raises:
        Damaged: it is missing, damaged or contradicts itself.
        CheckpointError: another format: this release cannot read it, and an older checkpoint is no substitute.
    """
    path = folder / MANIFEST
    if folder.is_symlink():
        raise Damaged(f"{folder}: is a link, and a checkpoint is a folder; resume from another one.")
    data = read_small(path)
    try:
        raw = parse_json(data)
        version = raw["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    if (folder / CHECKSUM).exists() or (folder / CHECKSUM).is_symlink() or version != 1:
        found, declared = hashlib.sha256(data).hexdigest(), read_small(folder / CHECKSUM)
        if declared != checksum_text(found).encode():
            raise Damaged(
                f"{path}: does not match its checksum in {CHECKSUM} (sha256 {found[:16]}, declared "
                f"{declared[:16].decode(errors='replace')}): one of the two is damaged; resume from another checkpoint."
            )
    if type(version) is not int or version not in (1, FORMAT):
        raise CheckpointError(
            f"{path}: has format {version!r}, and this Longspan reads 1 and {FORMAT}; use the release that wrote it, "
            "or another output folder."
        )
    try:
        files = {_file(name): FileFacts(count(f["bytes"]), _digest(f["sha256"])) for name, f in raw["files"].items()}
        tensors = _whole_files(folder) if version == 1 else dict(_entries(raw["tensors"], files))
        updates = _updates_of_format_1(folder) if version == 1 else count(raw["updates"])
        return Manifest(folder, version, count(raw["step"]), updates, tensors, files, dict(raw))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def checksum_text(digest: str) -> str:
    """Contents of manifest.sha256, which `sha256sum -c` checks."""
    return f"{digest}  {MANIFEST}\n"


def manifest_bytes(raw: Mapping[str, Any]) -> bytes:
    """A manifest as it is written."""
    return (json.dumps(raw, indent=1, sort_keys=True) + "\n").encode()


def _damaged(path: Path, error: Exception) -> Damaged:
    return Damaged(
        f"{path}: is not a checkpoint manifest ({type(error).__name__}: {error}); resume from another checkpoint."
    )


def _file(name: str) -> str:
    # The pattern has no separator: a name cannot leave the folder.
    if not _FILE.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a checkpoint's file")
    return name


def _digest(text: Any) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{text!r} is not a SHA-256")
    return text


def _entries(raw: Mapping[str, Any], files: Mapping[str, FileFacts]) -> list[tuple[str, TensorEntry]]:
    """Tensors of a format 2 manifest; ValueError unless the pieces of each tile it."""
    found = []
    for name, facts in raw.items():
        shape = tuple(count(size) for size in facts["shape"])
        if not 1 <= len(shape) <= 2 or not math.prod(shape):
            raise ValueError(f"{name} has shape {shape}")
        pieces = []
        for rank, cut, start, stop in facts["pieces"]:
            one, other = (_file(rank_file(kind, count(rank))) for kind in ("trained", "optimizer"))
            if one not in files or other not in files:
                raise ValueError(f"{name} lies in {one}, which is not listed with {other}")
            pieces.append(Piece(_cut(cut, shape), count(start), count(stop), one, other))
        entry = TensorEntry(shape, tuple(pieces))
        if not _tiles(entry):
            raise ValueError(f"the pieces of {name} do not make it up")
        found.append((name, entry))
    return found


def _cut(raw: Any, shape: Sequence[int]) -> Cut:
    if raw is None:
        return None
    dim, start, stop = (count(number) for number in raw)
    if dim >= len(shape) or not start < stop <= shape[dim]:
        raise ValueError(f"{raw} is no cut of {tuple(shape)}")
    return dim, start, stop


def _tiles(entry: TensorEntry) -> bool:
    """Whether every element lies in exactly one piece."""
    ranges: dict[Cut, list[tuple[int, int]]] = {}
    for piece in entry.pieces:
        ranges.setdefault(piece.cut, []).append((piece.start, piece.stop))
    for cut, spans in ranges.items():
        if not _joined(spans, math.prod(cut_shape(entry.shape, cut))):
            return False
    cuts = [cut for cut in ranges if cut is not None]
    if len(cuts) != len(ranges):
        return len(ranges) == 1
    dims = {cut[0] for cut in cuts}
    return len(dims) == 1 and _joined([cut[1:] for cut in cuts], entry.shape[dims.pop()])


def _joined(spans: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether [start, stop) spans, none empty, follow each other from 0 to `size`."""
    ordered = sorted(spans)
    ends = [0, *(stop for _, stop in ordered)]
    return ends[-1] == size and all(
        start == before and start < stop for before, (start, stop) in zip(ends, ordered, strict=False)
    )


def _whole_files(folder: Path) -> dict[str, TensorEntry]:
    """Tensors of a format 1 checkpoint, each one piece."""
    one, other = "trained.safetensors", "optimizer.safetensors"
    with ArrayFile(folder / one) as file:
        shapes = file.shapes
    return {name: TensorEntry(shape, (Piece(None, 0, math.prod(shape), one, other),)) for name, shape in shapes.items()}


def _updates_of_format_1(folder: Path) -> int:
    """It kept the count among the moments; 0 where there are none (nothing was ever trained from such a file)."""
    with ArrayFile(folder / "optimizer.safetensors") as file:
        return int(file.read("step", "I64")[0]) if "step" in file.shapes else 0
