"""A shard folder as a whole: put in its place at once, and what killed writers left beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.storage.durable import sync

MEND = "prepare the text again with tools.prepare_data"
"""What to do about a damaged folder."""


def replace_folder(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an older shard folder there is renamed away first, as rename needs an empty target."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        out.rename(old)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)
    sync(out.parent)


def remove_leftovers(out: Path) -> None:
    """Delete what writers of `out` that were killed left beside it; call with no writer of `out` at work."""
    for kind in ("writing", "old"):
        _remove(out, kind)


def _remove(out: Path, kind: str) -> None:
    prefix = f".{out.name}.{kind}-"
    for name in os.listdir(out.parent):
        if name.startswith(prefix) and len(name) == len(prefix) + 8:  # as many characters as mkdtemp adds
            shutil.rmtree(out.parent / name, ignore_errors=True)


@contextmanager
def all_or_none(folders: Sequence[Path]) -> Iterator[None]:
    """While this lasts shard folders are written that belong together; if it fails, those that were there are back.

    What stood there is put aside, under hidden names that the next success removes if this process is killed.
    """
    aside: list[tuple[Path, Path]] = []
    try:
        for folder in folders:
            if folder.exists():
                place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.aside-", dir=folder.parent))
                folder.rename(place)
                aside.append((folder, place))
        yield
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        for folder, place in aside:
            place.rename(folder)
        raise
    for folder in folders:
        _remove(folder, "aside")


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
