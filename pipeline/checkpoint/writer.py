"""A checkpoint written: every rank its own files, then rank 0 the manifest, one rename, `latest`. No torch.

Ranks tell rank 0 what they wrote through a small file each (`part-00003.json`), the last they write: no collective, so
that this may run on a thread beside training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint.manifest import (
    CHECKSUM,
    FORMAT,
    LATEST,
    MANIFEST,
    MASTER,
    MOMENTS,
    WRITING,
    Cut,
    checksum_text,
    folder_name,
    manifest_bytes,
    rank_file,
    step_of,
)
from pipeline.storage.durable import (
    make_folder,
    parse_json,
    read_small,
    remove,
    rename,
    replace_text,
    sync,
    write_arrays,
    write_file,
)


@dataclass(frozen=True)
class PieceArrays:
    """A rank's piece of a trained tensor: see `manifest.Piece`."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    cut: Cut
    start: int
    stop: int
    arrays: Mapping[str, np.ndarray]
    """fp32 [stop - start] of every field in `manifest.FIELDS`."""


def part_name(rank: int) -> str:
    """The file in which a rank tells that its others are written, and what they hold."""
    return f"part-{rank:05d}.json"


def working_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies until it is whole."""
    return folder / f"{WRITING}{folder_name(step)}"


def write_part(
    temporary: Path,
    rank: int,
    pieces: Sequence[PieceArrays],
    rng: Mapping[str, np.ndarray],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one rank's share of a checkpoint into its working folder, durably.

    Args:
        temporary: see `working_folder`; made if it is not there.
        rank: global rank.
        pieces: what this rank keeps, may be none.
        rng: its random state, uint8.
        on_bytes: called with every count of bytes written.

    Raises:
        OSError: the disk refused.
    """
    make_folder(temporary)
    contents = {
        "trained": {piece.name: piece.arrays[MASTER] for piece in pieces},
        "optimizer": {f"{piece.name}.{moment}": piece.arrays[moment] for piece in pieces for moment in MOMENTS},
        "rng": rng,
    }
    files = {}
    for kind, arrays in contents.items():
        if arrays:
            name = rank_file(kind, rank)
            files[name] = asdict(write_arrays(temporary / name, arrays, on_bytes))
    piece_rows = [[piece.name, list(piece.shape), piece.cut, piece.start, piece.stop] for piece in pieces]
    write_file(temporary / part_name(rank), [manifest_bytes({"files": files, "pieces": piece_rows})])


def publish(folder: Path, step: int, world: int, manifest: Mapping[str, Any]) -> Path:
    """Make the checkpoint whole, once all ranks have written their parts; returns its folder.

    Args:
        folder: `<output>/checkpoints`.
        step: optimizer steps done.
        world: ranks that wrote.
        manifest: what it records besides files and tensors.

    Raises:
        OSError: the disk refused; earlier checkpoints are untouched.
        CheckpointError: a part is not there.
    """
    temporary, final = working_folder(folder, step), folder / folder_name(step)
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for rank in range(world):
        part = parse_json(read_small(temporary / part_name(rank)))
        files |= part["files"]
        for name, shape, cut, start, stop in part["pieces"]:
            tensors.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append([rank, cut, start, stop])
    whole = {"format": FORMAT, "step": step, **manifest, "files": files, "tensors": tensors}
    facts = write_file(temporary / MANIFEST, [manifest_bytes(whole)])
    write_file(temporary / CHECKSUM, [checksum_text(facts.sha256).encode()])
    for path in list(temporary.iterdir()):  # the parts, and leftovers of an attempt that was cut off
        if path.name not in (*files, MANIFEST, CHECKSUM):
            remove(path)
    sync(temporary)
    if final.exists():
        # An earlier one of this step, which was damaged or the run would have started behind it.
        old = folder / f"{WRITING}old-{final.name}"
        remove(old)
        rename(final, old)
    rename(temporary, final)
    replace_text(folder / LATEST, final.name + "\n")
    return final


def prune(folder: Path, keep: int, keep_every: int) -> list[str]:
    """Forget all but the newest `keep` checkpoints and those of every `keep_every`-th step (0: none of these).

    Returns:
        What could not be removed, a sentence each: it is tried again after the next save.
    """
    kept = []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None]
    for step, path in sorted(found)[:-keep]:
        if not keep_every or step % keep_every:
            try:
                # Not removed under its name: half a checkpoint must never have a whole one's.
                rename(path, folder / f"{WRITING}old-{path.name}")
            except OSError as error:
                kept.append(_kept(path, error))
    return kept + clear_unfinished(folder)


def clear_unfinished(folder: Path) -> list[str]:
    """Remove what was never finished, or not finished being removed. The caller holds the lock.

    Returns:
        What could not be removed, a sentence each (NFS keeps a folder whose files somebody still reads): it is in
        nobody's way, but for the disk space.
    """
    names = (
        sorted(name for name in os.listdir(folder) if name.startswith((WRITING, f".{LATEST}")))
        if (folder.is_dir())
        else []
    )
    kept = []
    for name in names:
        try:
            remove(folder / name)
        except OSError as error:
            kept.append(_kept(folder / name, error))
    return kept


def _kept(path: Path, error: OSError) -> str:
    return f"{path}: could not be removed ({error.strerror or error}); no run needs it, remove it when you can."
