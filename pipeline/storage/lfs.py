"""Git LFS pointers: what a clone made without git-lfs leaves where a large file belongs. No torch."""

from __future__ import annotations

from pathlib import Path

from parallel.errors import CheckpointError, LongspanError

VERSION = b"version https://git-lfs.github.com/spec/v1"
"""First line of every pointer (git-lfs' docs/spec.md)."""
MAX_POINTER = 1024
"""A pointer is smaller than this, bytes."""


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with these bytes (at least `MAX_POINTER` of them, or all) is a pointer."""
    return len(head) < MAX_POINTER and head.startswith(VERSION) and b"\noid " in head


def refuse_pointer(path: Path, error: type[LongspanError] = CheckpointError) -> None:
    """Refuse a file that is only a pointer; one that cannot be read is left to whoever reads it.

    Raises:
        LongspanError: of the type `error`.
    """
    try:
        with path.open("rb") as file:
            head = file.read(MAX_POINTER)
    except OSError:
        return
    if is_pointer(head):
        raise error(pointer_sentence(path))


def pointer_sentence(path: Path) -> str:
    """What is wrong with a pointer, and how to mend it."""
    return f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull in its repository, or download it."
