"""Documents out of text files (`discovery` says which): one a file, a JSON line, an object of a list, a row of a table.

The order is that of the sorted relative paths, then of the lines or rows, on every machine. Anything unreadable is a
`DataError` that names the file (and line or byte): text silently dropped from a training set
is found weeks later or never.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from parallel.errors import DataError
from pipeline.data.discovery import find_texts
from pipeline.data.json_list import read_objects
from pipeline.data.kinds import BOM, LINES, LIST, TEXT, TextFile
from pipeline.data.packed import opened
from pipeline.data.schemas import is_conversation
from pipeline.data.tables import TABLES, Table, open_table

_CHUNK = 1 << 18
"""Bytes, or characters, of a document that are in memory at once."""


class Document(NamedTuple):
    """One non-empty document."""

    text: str
    file: Path
    line: int | None
    """1-based line of JSON lines and CSV, place in a JSON list, row of other tables, None for a whole file."""


class Piece(NamedTuple):
    """A document, or a part of a long one, cut anywhere."""

    text: str
    file: Path
    line: int | None
    """1-based line of JSON lines and CSV, place in a JSON list, row of other tables, None for a whole file."""
    ends: bool
    """The document ends with it."""


def check_first_record(file: TextFile, text_field: str) -> None:
    """Read the first record of JSON lines or of a table (packed or not) and nothing after it; of a text nothing.

    Raises:
        DataError: it cannot be read, or has no string at `text_field`.
    """
    if file.kind != TEXT:
        with _opened(file, text_field) as (pieces, _):
            next(pieces, None)


class RecordReader:
    """Iterates the documents of a file or folder once, counting as it goes.

    Args:
        path: file or folder.
        text_field: key of the text in JSON records, column of tables.

    Attributes:
        files: what is read, in order.
        file: the one being read.
        total_bytes: their size on disk.
        done_bytes: bytes on disk consumed so far (for a progress bar).
        documents: documents yielded so far.
        empty: documents skipped so far because they hold nothing but white space, or are missing values of a table.

    Raises:
        DataError: see `find_texts`; while iterating: an unreadable or truncated file, text that is not UTF-8, a line
            that is not a JSON object with a string at `text_field`, a table without such a column.
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
            self.file = file.path
            with _opened(file, self._text_field) as (read, done):
                blank: list[Piece] = []  # how a document begins, which may be all there is of it
                begun = False
                for piece in read:
                    self.done_bytes = before + done()
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


@contextlib.contextmanager
def _opened(file: TextFile, text_field: str) -> Iterator[tuple[Iterator[Piece], Callable[[], int]]]:
    """The pieces of one file, and how many of its bytes on disk were read so far."""
    if file.kind in TABLES:
        with open_table(file.path, file.kind, file.packing) as table:
            size = file.path.stat().st_size
            yield _read_table(table, file, text_field), lambda: int(size * table.done())
        return
    read = {LINES: _read_lines, LIST: _read_list}.get(file.kind, _read_whole)
    with opened(file.path, file.packing) as (raw, stream):
        yield read(stream, file, text_field), raw.tell


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
            yield from _parts(document)
    except DataError:
        # A damaged archive can yield a line of garbage before its checksum tells of the damage.
        while file.packing and stream.read(1 << 20):
            pass
        raise


def _read_list(stream: IO[bytes], file: TextFile, text_field: str) -> Iterator[Piece]:
    for number, record in read_objects(stream, file.path):
        text = _text_of(record, text_field, f"{file.path}: record {number}")
        yield from _parts(Document(text, file.path, number))


def _parts(document: Document) -> Iterator[Piece]:
    for start in range(0, len(document.text) or 1, _CHUNK):
        text = document.text[start : start + _CHUNK]
        yield Piece(text, document.file, document.line, start + _CHUNK >= len(document.text))


def _read_table(table: Table, file: TextFile, text_field: str) -> Iterator[Piece]:
    if text_field not in table.columns:
        raise _no_field(f"{file.path}: the table", text_field, {name: [] for name in table.columns})
    for number, row in table.rows([text_field]):
        text = _string_of(row, text_field, f"{file.path}: {table.unit} {number}")
        yield from _parts(Document(text, file.path, number))


def _lines(stream: IO[bytes], file: Path, text_field: str) -> Iterator[Document]:
    offset, name = 0, str(file)
    for number, line in enumerate(stream, 1):
        start = len(BOM) if number == 1 and line.startswith(BOM) else 0
        text = _decode(line[start:], file, offset + start)
        offset += len(line)
        # A blank line, usually the last one, is no record.
        if text.strip():
            where = f"{name}: line {number}"
            yield Document(_text_of(_record_of(text, text_field, where), text_field, where), file, number)


def _record_of(line: str, text_field: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON ({reason}); mend or remove it.") from error
    if not isinstance(record, dict):
        raise DataError(f'{where} is not a JSON object; write one {{"{text_field}": ...}} a line.')
    return record


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of one JSON record; `where` names file and line."""
    if text_field not in record:
        raise _no_field(where, text_field, record)
    return _string_of(record, text_field, where)


def _no_field(where: str, text_field: str, record: dict[str, Any]) -> DataError:
    keys = ", ".join(sorted(record)) or "nothing"
    how = "set the text field to one of its own"
    if is_conversation(record):
        how = "prepare conversations with longspan prepare --chat"
    return DataError(f"{where} has no field {text_field!r} (it has {keys}); {how}.")


def _string_of(record: dict[str, Any], text_field: str, where: str) -> str:
    text = record[text_field]
    if text is None:  # a missing value, as tables have them
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where} holds {type(text).__name__} in field {text_field!r}, not a string; mend it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} escapes half a surrogate pair at character {error.start}; mend it.") from error
    return text
