"""Files of a checkpoint: private, durable, checksummed as they are written, distrusted when they are read. No torch.

Tensors lie in safetensors files (an 8-byte little-endian header length, a JSON header, the bytes), here always flat.
Every system call that changes the disk goes through this file's `os`, so that tests can fail it at each.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from parallel.errors import CheckpointError
from pipeline.storage.safetensors_header import layout

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
BLOCK = 1 << 23
"""Bytes hashed and written, or read, at a time."""
MAX_JSON = 1 << 26
"""Bytes of a manifest or a header: a longer one is an attack or damage."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock says on a file system that lacks it (Lustre mounted without it, some FUSE and NFS)."""
CODES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1"), "I64": np.dtype("<i8")}
"""What a checkpoint holds: state, random state, counts."""


class Damaged(CheckpointError):
    """A checkpoint, or a file of it, is not what was written; another one may be whole."""


@dataclass(frozen=True)
class FileFacts:
    """A file as it was written."""

    bytes: int
    sha256: str
    """Hex."""


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk; OSError if it refuses."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a private folder and its parents, durably; an existing one is left as it is."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    try:
        os.mkdir(path, PRIVATE_FOLDER)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Move a file or folder in one step, replacing a file, and make that durable."""
    os.rename(source, target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; what is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(
    path: Path, chunks: Iterable[bytes | np.ndarray], on_bytes: Callable[[int], None] = lambda count: None
) -> FileFacts:
    """Write a new file, mode 0600, on the disk when this returns.

    Args:
        path: replaced if it is there: a leftover of an attempt that was cut off.
        chunks: its bytes, in order; arrays are contiguous.
        on_bytes: called with every count of bytes written.

    Raises:
        OSError: the disk refused; a part of the file may be left.
    """
    path.unlink(missing_ok=True)
    digest, size = hashlib.sha256(), 0
    # Never through a link somebody put there.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        for chunk in chunks:
            whole = memoryview(chunk.reshape(-1).view(np.uint8) if isinstance(chunk, np.ndarray) else chunk)
            for start in range(0, len(whole), BLOCK):
                block = whole[start : start + BLOCK]
                digest.update(block)
                while block:
                    count = os.write(handle, block)
                    block = block[count:]
                    size += count
                    on_bytes(count)
        os.fsync(handle)
    finally:
        os.close(handle)
    return FileFacts(size, digest.hexdigest())


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file in one step, durably; OSError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, [text.encode()])
    rename(temporary, path)


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], on_bytes: Callable[[int], None] = lambda count: None
) -> FileFacts:
    """Write a safetensors file of contiguous arrays of the dtypes in CODES; see `write_file`."""
    codes = {dtype: code for code, dtype in CODES.items()}
    entries = {name: (codes[a.dtype], a.shape, a.itemsize, a.nbytes) for name, a in arrays.items()}
    header, order = layout(entries, {"format": "np"})
    return write_file(path, [header, *(arrays[name] for name in order)], on_bytes)


def open_plain(path: Path) -> int:
    """Open a file for reading, if it is one: no link, no device, no pipe. Returns the descriptor.

    Raises:
        Damaged: it is missing or something else.
    """
    try:
        # Without NONBLOCK, opening a named pipe would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise Damaged(f"{path}: is a link, and a checkpoint has none; resume from another checkpoint.") from None
        if isinstance(error, FileNotFoundError):
            raise Damaged(f"{path}: is missing from the checkpoint; resume from another one.") from None
        raise Damaged(f"{path}: cannot be read ({error.strerror}); mend that, or resume from another.") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damaged(f"{path}: is not a plain file; resume from another checkpoint.")
    return handle


def read_small(path: Path) -> bytes:
    """A plain file of at most MAX_JSON bytes; see `open_plain` for the errors."""
    with os.fdopen(open_plain(path), "rb") as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise Damaged(f"{path}: is longer than {MAX_JSON} bytes, which none of ours is; resume from another.")
    return data


def parse_json(data: bytes) -> Any:
    """JSON from bytes; ValueError for whatever is wrong with it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def facts_of(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> FileFacts:
    """Size and checksum of a plain file as it lies on the disk; see `open_plain` for the errors."""
    digest, size = hashlib.sha256(), 0
    try:
        with os.fdopen(open_plain(path), "rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
                on_bytes(len(block))
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror}); mend that, or resume from another.") from None
    return FileFacts(size, digest.hexdigest())


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    """In the file, bytes."""


class ArrayFile:
    """A safetensors file, read in pieces; a context manager.

    Raises:
        Damaged: it is no such file, or its header does not describe it exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.fdopen(open_plain(path), "rb", buffering=0)
        try:
            self._entries = dict(self._header(os.fstat(self._file.fileno()).st_size))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            self._file.close()
            raise Damaged(f"{path}: is no whole safetensors file ({error}); resume from another checkpoint.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _header(self, size: int) -> Iterator[tuple[str, _Entry]]:
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > min(MAX_JSON, size - 8):
            raise ValueError("its header is longer than the file, or than any of ours")
        header = parse_json(self._file.read(length))
        end = 0
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda pair: tuple(pair[1]["data_offsets"])):
            dtype = CODES.get(entry["dtype"])
            shape = tuple(count(number) for number in entry["shape"])
            if dtype is None:
                raise ValueError(f"{name} has dtype {entry['dtype']!r}, which a checkpoint does not hold")
            start, stop = (count(number) for number in entry["data_offsets"])
            if start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not lie where its header says")
            end = stop
            yield name, _Entry(dtype, shape, 8 + length + start)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes instead of {8 + length + end}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, dtype: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of an array, flattened.

        Raises:
            Damaged: the file has no such array of this dtype (a key of CODES), or not so many elements.
        """
        entry = self._entries.get(name)
        size = -1 if entry is None else math.prod(entry.shape)
        stop = size if stop is None else stop
        if entry is None or entry.dtype != CODES[dtype] or not 0 <= start <= stop <= size:
            raise Damaged(
                f"{self.path}: has no {dtype} array {name} with elements {start} to {stop}; resume from another "
                "checkpoint."
            )
        found = np.empty(stop - start, entry.dtype)
        view = memoryview(found.view(np.uint8)) if found.size else memoryview(b"")
        self._file.seek(entry.offset + start * entry.dtype.itemsize)
        while view:
            got = self._file.readinto(view[:BLOCK])
            if not got:
                raise Damaged(f"{self.path}: ends early; resume from another checkpoint.")
            view = view[got:]
        return found


def count(value: Any) -> int:
    """A non-negative integer out of JSON; ValueError for anything else (a truth value, a float)."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value
