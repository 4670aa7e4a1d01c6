"""A shard folder as a whole: put in its place at once, and what killed writers left beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.storage.durable import sync

MEND = "prepare the text again with longspan prepare"
"""What to do about a damaged folder."""


def replace_folders(new: Mapping[Path, Path]) -> None:
    """Rename each folder `new[out]` to its `out`; the older shard folders there are renamed away first, all of them.

    So a killed process leaves old folders, new ones, or one missing, and never an old beside a new one of folders that
    belong together. What fails, and what the next call finds cut short, is undone.
    """
    try:
        for out in new:
            if out.exists():
                out.rename(_beside(out, "old"))
        for out, folder in new.items():
            folder.rename(out)
            sync(out.parent)
    finally:
        _settle(list(new))


def remove_leftovers(*folders: Path) -> None:
    """Undo a replacement of these folders that was cut short, and delete what killed writers of them left beside them.

    Call with no writer of them at work.
    """
    _settle(folders)
    for folder in folders:
        for place in _left(folder, "writing"):
            shutil.rmtree(place, ignore_errors=True)


def _settle(folders: Sequence[Path]) -> None:
    """Put older folders back if one is missing; else delete them."""
    cut_short = not all(folder.exists() for folder in folders)
    for folder in folders:
        # "aside": an earlier version put folders there while it wrote. glob passes over what it may not read.
        replaced = [place for place in _left(folder, "old", "aside") if any(place.glob("*"))]
        if cut_short and replaced:
            if folder.exists():
                _discard(folder, folder)
            # The first put aside, if there are several, was there when all was well.
            min(replaced, key=lambda place: place.stat().st_ctime_ns).rename(folder)
            sync(folder.parent)
        for place in _left(folder, "old", "aside"):
            _discard(place, folder)


def _discard(place: Path, folder: Path) -> None:
    """Delete what nobody puts back, half deleted as it may be, as it has another name by then."""
    with suppress(OSError):
        place = place.rename(_beside(folder, "writing"))
    shutil.rmtree(place, ignore_errors=True)


def _beside(folder: Path, kind: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.{kind}-", dir=folder.parent))


def _left(folder: Path, *kinds: str) -> list[Path]:
    names = tuple(f".{folder.name}.{kind}-" for kind in kinds)
    return [
        folder.parent / name
        for name in os.listdir(folder.parent)
        if name[:-8] in names  # mkdtemp adds eight characters
    ]


def read_array(file: Path) -> NDArray[Any]:
    """The array of a .npy file.

    Raises:
        DataError: it is damaged.
    """
    try:
        with file.open("rb") as stream:
            # Not np.load, which opens a zip archive as well.
            return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header: a damaged one raises nearly anything, MemoryError included
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: is damaged ({reason}); {MEND}.") from error


def starts_are_sound(starts: NDArray[Any], documents: int, tokens: int) -> bool:
    """Whether they can be where so many documents start in a stream of so many tokens."""
    return (
        starts.ndim == 1
        and starts.dtype.kind == "i"
        and starts.size == documents > 0
        and int(starts[0]) == 0
        and bool((np.diff(starts) > 0).all())
        and int(starts[-1]) < tokens
    )
