"""Which checkpoint a run goes on from: the newest whole one, why, and what is wrong with newer ones. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import CheckpointError
from pipeline.checkpoint.manifest import LATEST, WRITING, step_of
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.storage.durable import Damaged, read_small, remove, rename, replace_text


@dataclass(frozen=True)
class Choice:
    """A checkpoint to go on from."""

    folder: Path
    step: int
    reason: str
    """Why this one: half a sentence."""
    warnings: tuple[str, ...]
    """One sentence for each newer checkpoint that is damaged, and what else does not fit."""


def candidates(folder: Path) -> list[Path]:
    """Checkpoint folders below `<output>/checkpoints`, newest first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def choose(folder: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Choice | None:
    """The newest checkpoint whose every file matches its checksum; None for a run that never finished a save.

    Args:
        folder: `<output>/checkpoints`.
        on_bytes: called with every count of bytes read.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or `latest` names one and there is none: a run must
            not silently start over. Or the newest is of a format this release cannot read.
    """
    damage: list[str] = []
    found = candidates(folder)
    pointer = _pointer(folder)
    for path in found:
        try:
            with CheckpointReader(path) as reader:
                size, step = reader.verify(on_bytes), reader.manifest.step
                if step != step_of(path.name):
                    raise Damaged(f"{path}: its manifest is of step {step}; resume from another checkpoint.")
        except Damaged as error:
            damage.append(str(error))
            continue
        count = len(reader.manifest.files)
        how = "the newest whole one" if damage else "the newest"
        reason = f"{how}; {count} files, {size / 1e6:,.1f} MB, all match their checksums"
        if pointer != path.name:
            said = "is missing" if pointer is None else f"says {pointer[:40]!r}"
            damage.append(
                f"{folder / LATEST}: {said}, and {path.name} is the newest whole checkpoint: a save was cut off, or "
                "the file was changed; going by the checkpoints themselves."
            )
        return Choice(path, step, reason, tuple(damage) + tuple(_unfinished(folder)))
    if damage:
        raise CheckpointError(
            f"{folder}: none of its {len(found)} checkpoints is whole ({damage[0].rstrip('.')}); restore one, or "
            "remove the folder to start over."
        )
    if pointer is not None:
        raise CheckpointError(
            f"{folder / LATEST}: names {pointer[:40]!r}, which is not a checkpoint beside it; restore that, or remove "
            f"{folder} to start over."
        )
    return None


def set_aside(folder: Path, after: int) -> tuple[int | None, list[str]]:
    """Rename checkpoints of more than `after` steps, written by a run that had diverged, so that no resume takes them.

    Returns:
        Step of the newest one left (None: none is), and the new names.

    Raises:
        OSError: one could not be renamed.
    """
    moved = []
    for path in candidates(folder):
        if (step_of(path.name) or 0) > after:
            aside = path.with_name(f"diverged-{path.name}")
            remove(aside)
            rename(path, aside)
            moved.append(aside.name)
    left = candidates(folder)
    if left and moved:
        replace_text(folder / LATEST, left[0].name + "\n")
    elif moved:
        remove(folder / LATEST)
    return (step_of(left[0].name) if left else None), moved


def newest(folder: Path) -> Path | None:
    """Folder of the checkpoint `choose` gives, warnings on standard error; for tools that only read."""
    choice = choose(folder)
    if choice is None:
        return None
    for warning in choice.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return choice.folder


def _pointer(folder: Path) -> str | None:
    """What `latest` says; None if it is missing or no plain file."""
    try:
        return read_small(folder / LATEST).decode(errors="replace").strip()
    except Damaged:
        return None


def _unfinished(folder: Path) -> list[str]:
    return [
        f"{path}: a save was cut off before it was whole; ignored." for path in sorted(folder.glob(f"{WRITING}step-*"))
    ]
