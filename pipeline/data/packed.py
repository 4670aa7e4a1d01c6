"""Compressed files, told by their first bytes and read as a stream that drops nothing."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import zstandard

from parallel.errors import DataError

PACKINGS = ("xz", "gz", "zst", "bz2")
_MAGIC = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
_BZIP2, _BZIP2_BLOCKS = b"BZh", (b"1AY&SY", b"\x17rE8P\x90")
"""Text may begin with the first; after one more byte follows a block, or the end of an empty file."""
_CHUNK = 1 << 18
_PACKED = 1 << 14
"""Bytes of an archive unpacked at once: a thousand times as many may come out."""
_ARCHIVE_ERRORS = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError)


def packing_of(head: bytes) -> str:
    """xz, gz, zst or bz2, as a file's first bytes tell; empty: it is not compressed by any of them."""
    if head.startswith(_BZIP2) and head[4:10] in _BZIP2_BLOCKS:
        return "bz2"
    return next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), "")


def begins_packed(head: bytes) -> bool:
    """Whether a file of these few bytes may be a packed one that was cut off."""
    bzip2 = _BZIP2.startswith(head[:3]) and any(block.startswith(head[4:]) for block in _BZIP2_BLOCKS)
    return bzip2 or any(magic.startswith(head) for magic in _MAGIC)


class _FrameReader(io.RawIOBase):
    """Decompressed bytes of consecutive frames (.zst) or streams (.xz, .bz2).

    Unlike the libraries' own readers it drops nothing: zstandard's takes a truncated frame for a whole one, and lzma's
    takes a damaged second stream for the end of the file.

    Args:
        raw: compressed bytes.
        make: a decompressor of one frame.
        padding: zero bytes may stand between and after frames, as in .xz.
    """

    def __init__(self, raw: BinaryIO, make: Callable[[], Any], padding: bool) -> None:
        self._raw = raw
        self._make = make
        self._padding = padding
        self._decompressor = make()
        self._inside_frame = True  # an empty file is a truncated one
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._raw.read(_PACKED)
            if not packed:
                if self._inside_frame:
                    raise EOFError("it ends early")
                return 0
            self._ready = self._decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, packed: bytes) -> bytes:
        parts = []
        while packed:
            if not self._inside_frame:
                packed = packed.lstrip(b"\0") if self._padding else packed
                if not packed:
                    break
                self._decompressor = self._make()
            parts.append(self._decompressor.decompress(packed))
            self._inside_frame = not self._decompressor.eof
            packed = b"" if self._inside_frame else self._decompressor.unused_data
        return b"".join(parts)


def _zstd_frame() -> Any:
    return zstandard.ZstdDecompressor().decompressobj()


def _decompressed(raw: BinaryIO, packing: str) -> IO[bytes]:
    if packing == "xz":
        return io.BufferedReader(_FrameReader(raw, lzma.LZMADecompressor, padding=True), _CHUNK)
    if packing == "gz":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if packing == "zst":
        return io.BufferedReader(_FrameReader(raw, _zstd_frame, padding=False), _CHUNK)
    if packing == "bz2":
        return io.BufferedReader(_FrameReader(raw, bz2.BZ2Decompressor, padding=False), _CHUNK)
    return raw


@contextlib.contextmanager
def opened(file: Path, packing: str) -> Iterator[tuple[BinaryIO, IO[bytes]]]:
    """The file's own bytes, and them decompressed.

    Args:
        packing: see `packing_of`.

    Raises:
        DataError: for whatever goes wrong while they are read.
    """
    try:
        with file.open("rb") as raw, _decompressed(raw, packing) as stream:
            yield raw, stream
    except _ARCHIVE_ERRORS as error:
        raise DataError(f"{file}: the archive is truncated or corrupt ({error}); copy it again.") from error
    except OSError as error:
        if packing == "bz2" and error.errno is None:  # it has no error class of its own
            raise DataError(f"{file}: the archive is truncated or corrupt ({error}); copy it again.") from error
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); mend or remove it.") from error
