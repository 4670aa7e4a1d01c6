"""Documents out of text files (`discovery` says which): one a file, or one a JSON line.

The order is that of the sorted relative paths, then of the lines, on every machine. Anything unreadable is a
`DataError` that names the file (and line or byte): text silently dropped from a training set
is found weeks later or never.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from parallel.errors import DataError
from pipeline.data.discovery import BOM, LINES, TextFile, find_texts
from pipeline.data.packed import opened
from pipeline.data.schemas import schema_of

_CHUNK = 1 << 18
"""Bytes, or characters, of a document that are in memory at once."""


@dataclass(frozen=True)
class Document:
    """One non-empty document."""

    text: str
    file: Path
    line: int | None
    """1-based line of JSON lines, None for a whole file."""


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one, cut anywhere."""

    text: str
    file: Path
    line: int | None
    """1-based line of JSON lines, None for a whole file."""
    ends: bool
    """The document ends with it."""


def check_first_record(file: TextFile, text_field: str) -> None:
    """Read the first record of JSON lines (packed or not) and nothing after it; of another file nothing.

    Raises:
        DataError: it cannot be read, or is not a JSON object with a string at `text_field`.
    """
    if file.kind == LINES:
        with opened(file.path, file.packing) as (_, stream):
            next(_lines(stream, file.path, text_field), None)


class RecordReader:
    """Iterates the documents of a file or folder once, counting as it goes.

    Args:
        path: file or folder.
        text_field: key of the text in JSON records.

    Attributes:
        files: what is read, in order.
        file: the one being read.
        total_bytes: their size on disk.
        done_bytes: bytes on disk consumed so far (for a progress bar).
        documents: documents yielded so far.
        empty: documents skipped so far because they hold nothing but white space.

    Raises:
        DataError: see `find_texts`; while iterating: an unreadable or truncated file, text that is not UTF-8, a line
            that is not a JSON object with a string at `text_field`.
    """

    def __init__(self, path: Path, text_field: str = "text") -> None:
        self.files = find_texts(path, text_field).files
        self._text_field = text_field
        try:
            self._sizes = [file.path.stat().st_size for file in self.files]
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
            read = _read_lines if file.kind == LINES else _read_whole
            self.file = file.path
            with opened(file.path, file.packing) as (raw, stream):
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


def _read_whole(stream: IO[bytes], file: TextFile, _: str) -> Iterator[Piece]:
    data = stream.read(_CHUNK)
    offset = len(BOM) if data.startswith(BOM) else 0
    data = data[offset:]
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        more = stream.read(_CHUNK) if data else b""
        begun = len(decoder.getstate()[0])  # bytes of a character that the last part cut
        try:
            text = decoder.decode(data, final=not more)
        except UnicodeDecodeError as error:
            raise _not_utf8(file.path, offset - begun + error.start) from error
        yield Piece(text, file.path, None, not more)
        if not more:
            return
        offset += len(data)
        data = more


def _read_lines(stream: IO[bytes], file: TextFile, text_field: str) -> Iterator[Piece]:
    try:
        for document in _lines(stream, file.path, text_field):
            for start in range(0, len(document.text) or 1, _CHUNK):
                text = document.text[start : start + _CHUNK]
                yield Piece(text, file.path, document.line, start + _CHUNK >= len(document.text))
    except DataError:
        # A damaged archive can yield a line of garbage before its checksum tells of the damage.
        while file.packing and stream.read(1 << 20):
            pass
        raise


def _lines(stream: IO[bytes], file: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, 1):
        start = len(BOM) if number == 1 and line.startswith(BOM) else 0
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
        how = "set the text field to one of its own"
        if schema_of(record) is not None:
            how = "prepare conversations with tools.prepare_data --chat"
        raise DataError(f"{where} has no field {text_field!r} (it has {keys}); {how}.")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where} holds {type(text).__name__} in field {text_field!r}, not a string; mend it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} escapes half a surrogate pair at character {error.start}; mend it.") from error
    return text
