"""Documents out of text files: .txt (one document a file) and .jsonl (one a line), plain or as .xz, .gz, .zst.

The order is that of the sorted relative paths, then of the lines, on every machine. Anything unreadable is a
`DataError` that names the file (and line or byte): text silently dropped from a training set
is found weeks later or never.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import zstandard

from parallel.errors import DataError

KINDS = (".txt", ".jsonl")
COMPRESSIONS = ("", ".xz", ".gz", ".zst")
ENDINGS = tuple(kind + compression for kind in KINDS for compression in COMPRESSIONS)

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 18
_PACKED = 1 << 14
"""Bytes of an archive unpacked at once: a thousand times as many may come out."""
_ARCHIVE_ERRORS = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError)


@dataclass(frozen=True)
class Document:
    """One non-empty document."""

    text: str
    file: Path
    line: int | None
    """1-based line in a .jsonl file, None for a .txt file."""


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one, cut anywhere."""

    text: str
    file: Path
    line: int | None
    """1-based line in a .jsonl file, None for a .txt file."""
    ends: bool
    """The document ends with it."""


def _kind(name: str) -> str | None:
    """'.txt', '.jsonl', or None if the name does not end in one of ENDINGS (any case)."""
    lowered = name.lower()
    return next((kind for kind in KINDS for packed in COMPRESSIONS if lowered.endswith(kind + packed)), None)


def find_files(path: Path) -> list[Path]:
    """Every readable file at or below `path`, sorted by relative path; hidden files and folders are skipped.

    Links to folders are followed, each real folder once.

    Raises:
        DataError: `path` is missing, is a file of another kind, or holds no file of a known kind.
    """
    accepted = ", ".join(ENDINGS)
    if path.is_file():
        if _kind(path.name) is None:
            raise DataError(f"{path}: its ending is not one of {accepted}; rename or convert it.")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; point it at text ({accepted}).")
    found: list[Path] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        # Sorted also while walking: which of two links to one folder is visited first must not depend on the disk.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".") and _kind(name) is not None]
    if not found:
        raise DataError(f"{path}: holds no file ending in {accepted}; add text or point somewhere else.")
    return sorted(found, key=lambda file: file.relative_to(path).parts)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions.") from error


class _FrameReader(io.RawIOBase):
    """Decompressed bytes of consecutive frames (.zst) or streams (.xz).

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


def _decompressed(raw: BinaryIO, name: str) -> IO[bytes]:
    suffix = Path(name).suffix.lower()
    if suffix == ".xz":
        return io.BufferedReader(_FrameReader(raw, lzma.LZMADecompressor, padding=True), _CHUNK)
    if suffix == ".gz":
        if os.fstat(raw.fileno()).st_size == 0:
            raise EOFError("empty gzip file")  # Python's gzip takes it for an empty text
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if suffix == ".zst":
        return io.BufferedReader(_FrameReader(raw, _zstd_frame, padding=False), _CHUNK)
    return raw


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, IO[bytes]]]:
    """The file's own bytes, and them decompressed; DataError for whatever goes wrong while they are read."""
    try:
        with file.open("rb") as raw, _decompressed(raw, file.name) as stream:
            yield raw, stream
    except _ARCHIVE_ERRORS as error:
        raise DataError(f"{file}: the archive is truncated or corrupt ({error}); copy it again.") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); mend or remove it.") from error


def check_first_record(file: Path, text_field: str) -> None:
    """Read the first record of a .jsonl file (packed or not) and nothing after it; of another file nothing.

    Raises:
        DataError: it cannot be read, or is not a JSON object with a string at `text_field`.
    """
    if _kind(file.name) == ".jsonl":
        with _opened(file) as (_, stream):
            next(_lines(stream, file, text_field), None)


class RecordReader:
    """Iterates the documents of a file or folder once, counting as it goes.

    Args:
        path: file or folder.
        text_field: key of the text in .jsonl records.

    Attributes:
        files: what is read, in order.
        file: the one being read.
        total_bytes: their size on disk.
        done_bytes: bytes on disk consumed so far (for a progress bar).
        documents: documents yielded so far.
        empty: documents skipped so far because they hold nothing but white space.

    Raises:
        DataError: see `find_files`; while iterating: an unreadable or truncated file, text that is not UTF-8, a line
            that is not a JSON object with a string at `text_field`.
    """

    def __init__(self, path: Path, text_field: str = "text") -> None:
        self.files = find_files(path)
        self._text_field = text_field
        try:
            self._sizes = [file.stat().st_size for file in self.files]
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); mend or remove it.") from error
        self.total_bytes = sum(self._sizes)
        self.file = path
        self.done_bytes = self.documents = self.empty = 0

    def __iter__(self) -> Iterator[Document]:
        parts: list[str] = []
        for piece in self.pieces():
            parts.append(piece.text)
            if piece.ends:
                yield Document("".join(parts), piece.file, piece.line)
                parts = []

    def pieces(self) -> Iterator[Piece]:
        """The same documents, long ones in parts of no more than some hundred thousand characters each."""
        before = 0
        for file, size in zip(self.files, self._sizes, strict=True):
            read = _read_lines if _kind(file.name) == ".jsonl" else _read_whole
            self.file = file
            with _opened(file) as (raw, stream):
                blank: list[Piece] = []  # how a document begins, which may be all there is of it
                begun = False
                for piece in read(stream, file, self._text_field):
                    self.done_bytes = before + raw.tell()
                    begun = begun or bool(piece.text.strip())
                    if begun:
                        # Counted with its last part, which is the one that ends it.
                        self.documents += piece.ends
                        yield from blank
                        yield piece
                        blank = []
                    else:
                        blank.append(piece)
                    if piece.ends:
                        self.empty += not begun
                        begun, blank = False, []
            before += size
            self.done_bytes = before


def _decode(data: bytes, file: Path, offset: int) -> str:
    """UTF-8 text of `data`, which starts `offset` bytes into the (decompressed) file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, offset + error.start) from error


def _not_utf8(file: Path, place: int) -> DataError:
    return DataError(f"{file}: byte {place} of the text is not UTF-8; convert the file (for example with iconv).")


def _read_whole(stream: IO[bytes], file: Path, _: str) -> Iterator[Piece]:
    data = stream.read(_CHUNK)
    offset = len(_BOM) if data.startswith(_BOM) else 0
    data = data[offset:]
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        more = stream.read(_CHUNK) if data else b""
        begun = len(decoder.getstate()[0])  # bytes of a character that the last part cut
        try:
            text = decoder.decode(data, final=not more)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, offset - begun + error.start) from error
        yield Piece(text, file, None, not more)
        if not more:
            return
        offset += len(data)
        data = more


def _read_lines(stream: IO[bytes], file: Path, text_field: str) -> Iterator[Piece]:
    try:
        for document in _lines(stream, file, text_field):
            for start in range(0, len(document.text) or 1, _CHUNK):
                text = document.text[start : start + _CHUNK]
                yield Piece(text, file, document.line, start + _CHUNK >= len(document.text))
    except DataError:
        # A damaged archive can yield a line of garbage before its checksum tells of the damage.
        while file.suffix != ".jsonl" and stream.read(1 << 20):
            pass
        raise


def _lines(stream: IO[bytes], file: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, 1):
        start = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        text = _decode(line[start:], file, offset + start)
        offset += len(line)
        # A blank line, usually the last one, is no record.
        if text.strip():
            yield Document(_text_of(text, text_field, f"{file}: line {number}"), file, number)


def _text_of(line: str, text_field: str, where: str) -> str:
    """The text of one JSON record; `where` names file and line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON ({reason}); mend or remove it.") from error
    if not isinstance(record, dict):
        raise DataError(f'{where} is not a JSON object; write one {{"{text_field}": ...}} a line.')
    if text_field not in record:
        keys = ", ".join(sorted(record)) or "nothing"
        raise DataError(f"{where} has no field {text_field!r} (it has {keys}); set the text field to one of its own.")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where} holds {type(text).__name__} in field {text_field!r}, not a string; mend it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} escapes half a surrogate pair at character {error.start}; mend it.") from error
    return text
