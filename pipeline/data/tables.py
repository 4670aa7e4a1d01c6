"""Rows of tables, a few at a time: Parquet and Arrow (through pyarrow, an extra), and CSV.

Arrow is read in both its forms, the file (Feather 2) and the stream, which is what `datasets.save_to_disk` writes.
Damage anywhere is a `DataError` that names file and row.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

from parallel.errors import DataError
from pipeline.data.packed import opened
from pipeline.reporting.words import counted

PARQUET, ARROW, CSV = "Parquet", "Arrow", "CSV"
TABLES = (PARQUET, ARROW, CSV)
TABLE_ENDINGS = {
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
    **dict.fromkeys((".arrow", ".feather"), ARROW),
    **dict.fromkeys((".csv", ".tsv"), CSV),
}
_MAGIC = {b"PAR1": PARQUET, b"ARROW1\0\0": ARROW, b"\xff\xff\xff\xff": ARROW}
_FILE = b"ARROW1"
_ROWS = 64
"""Rows in memory at once; one may hold a book."""
SEPARATORS = ",\t;|"
_LONGEST_FIELD = 1 << 28
"""Characters of one CSV field: a quote that is never closed must not take the rest of a large file into memory."""


def table_of(head: bytes, ending: str) -> str:
    """PARQUET, ARROW or CSV, as a file's (unpacked) first bytes tell; empty: none of them.

    Args:
        head: at least 8 bytes, or all.
        ending: of its name, with the dot, in lower case. CSV has no mark of its own and is known by it, unless the
            content is JSON.
    """
    found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    if not found and TABLE_ENDINGS.get(ending) == CSV and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"["):
        return CSV
    return found


class Table(Protocol):
    """An open table."""

    columns: tuple[str, ...]
    """Names, in the file's order."""
    unit: str
    """What a row's number counts: `row`, from 1, or `line` of the file."""

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and values of every row, of the wanted columns only; a missing value is None.

        Raises:
            DataError: the table is damaged, or has a wanted column twice.
        """

    def done(self) -> float:
        """Share of the file that was read, in [0, 1]."""


@contextlib.contextmanager
def open_table(file: Path, kind: str, packing: str) -> Iterator[Table]:
    """Open a table.

    Args:
        kind: see `table_of`.
        packing: of CSV, see `packing_of`.

    Raises:
        DataError: it cannot be read, is damaged, or pyarrow is missing.
    """
    if kind == CSV:
        with opened(file, packing) as (raw, stream):
            yield _Csv(file, raw, stream)
        return
    with _failures(file, kind, [0]):
        table = _parquet(file) if kind == PARQUET else _arrow(file)
    try:
        yield table
    finally:
        with contextlib.suppress(Exception):  # whatever closing a damaged file raises was told before
            table.close()


class _Columnar:
    """Batches of pyarrow as rows."""

    unit = "row"

    def __init__(self, file: Path, kind: str, columns: list[str], source: Any) -> None:
        self.columns = tuple(columns)
        self._file, self._kind, self._source = file, kind, source

    def batches(self, wanted: list[str]) -> Iterator[Any]:
        """Record batches of these columns."""
        raise NotImplementedError

    def done(self) -> float:
        raise NotImplementedError

    def close(self) -> None:
        self._source.close()

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        chosen = _chosen(self._file, self.columns, wanted)
        read = [0]
        with _failures(self._file, self._kind, read):
            for batch in self.batches(chosen):
                # A damaged file may hold offsets that lead outside of it, and bytes that are not UTF-8.
                batch.validate(full=True)
                for start in range(0, batch.num_rows, _ROWS):
                    part = batch.slice(start, _ROWS)
                    columns = [(name, part.column(name).to_pylist(maps_as_pydicts="strict")) for name in chosen]
                    for place in range(part.num_rows):
                        read[0] += 1
                        yield read[0], {name: _without_none(values[place]) for name, values in columns}


def _without_none(value: Any) -> Any:
    """The value without the fields that a struct has only because other rows have them."""
    if isinstance(value, dict):
        return {name: _without_none(member) for name, member in value.items() if member is not None}
    return [_without_none(member) for member in value] if isinstance(value, list) else value


class _Parquet(_Columnar):
    _taken = 0

    def batches(self, wanted: list[str]) -> Iterator[Any]:
        for batch in self._source.iter_batches(_ROWS, columns=wanted, use_threads=False):
            self._taken += batch.num_rows
            yield batch

    def done(self) -> float:
        return float(self._taken / max(1, self._source.metadata.num_rows))


class _Arrow(_Columnar):
    def __init__(self, file: Path, reader: Any, source: Any, random_access: bool) -> None:
        super().__init__(file, ARROW, reader.schema.names, source)
        self._reader, self._random_access = reader, random_access
        self._size = max(1, source.size())
        self._place = 0.0

    def batches(self, wanted: list[str]) -> Iterator[Any]:
        if not self._random_access:
            for batch in self._reader:
                self._place = self._source.tell() / self._size
                yield batch.select(wanted)
            return
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            self._place = (number + 1) / self._reader.num_record_batches
            yield batch.select(wanted)

    def done(self) -> float:
        return self._place


def _parquet(file: Path) -> _Columnar:
    from pyarrow import parquet

    # A buffer: column chunks, which may be as large as the file, are not read as a whole.
    source = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    return _Parquet(file, PARQUET, source.schema_arrow.names, source)


def _arrow(file: Path) -> _Columnar:
    import pyarrow

    with file.open("rb") as stream:
        random_access = stream.read(len(_FILE)) == _FILE
    source = pyarrow.memory_map(str(file))  # a record batch may be as large as the file
    reader = pyarrow.ipc.open_file(source) if random_access else pyarrow.ipc.open_stream(source)
    return _Arrow(file, reader, source, random_access)


@contextlib.contextmanager
def _failures(file: Path, kind: str, read: list[int]) -> Iterator[None]:
    """Make whatever pyarrow raises one sentence; `read` holds the rows that were given out."""
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"{file}: is {kind}, for which pyarrow is needed; run: python -m pip install 'pyarrow>=20'."
        ) from error
    except PermissionError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); mend or remove it.") from error
    except (ValueError, OSError, KeyError, NotImplementedError, MemoryError, OverflowError, TypeError) as error:
        # pyarrow's own errors are all kinds of these.
        reason = " ".join(str(error).split())[:160].rstrip(".")
        place = f"row {read[0] + 1} or one after it" if read[0] else "it"
        raise DataError(f"{file}: {place} cannot be read as {kind} ({reason}); copy it again.") from error


class _Csv:
    """Comma, tab, semicolon or bar separated values in UTF-8, the first line naming the columns."""

    unit = "line"

    def __init__(self, file: Path, raw: IO[bytes], stream: IO[bytes]) -> None:
        self._file, self._raw = file, raw
        self._size = max(1, file.stat().st_size)
        csv.field_size_limit(_LONGEST_FIELD)
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        with self._failures():
            first = self._text.readline(_LONGEST_FIELD)
        # What the header is separated by, the others too.
        separator = max(SEPARATORS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        self._reader = csv.reader(chain([first], self._text), delimiter=separator, strict=True)
        with self._failures():
            self.columns = tuple(next(self._reader, []))
        if not any(self.columns):
            raise DataError(f"{file}: line 1 names no columns; put their names into the first line.")

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        chosen = [(name, self.columns.index(name)) for name in _chosen(self._file, self.columns, wanted)]
        while True:
            number = self._reader.line_num + 1
            with self._failures():
                row = next(self._reader, None)
            if row is None:
                return
            if row and len(row) != len(self.columns):
                raise DataError(
                    f"{self._file}: line {number} has {counted(len(row), 'field')} and the first line "
                    f"{len(self.columns)}; mend or remove it "
                    "(a field that holds the separator, quotes or line breaks is put in quotes)."
                )
            if row:
                yield number, {name: row[place] for name, place in chosen}

    def done(self) -> float:
        return self._raw.tell() / self._size

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        line = self._reader.line_num + 1 if hasattr(self, "_reader") else 1
        try:
            yield
        except csv.Error as error:
            raise DataError(f"{self._file}: line {line} is not CSV ({error}); mend or remove it.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._file}: line {line} or one soon after it is not UTF-8; convert the file (for example with "
                "iconv)."
            ) from error


def _chosen(file: Path, columns: tuple[str, ...], wanted: Collection[str]) -> list[str]:
    chosen = [name for name in dict.fromkeys(columns) if name in wanted]
    twice = next((name for name in chosen if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}: has two columns {twice!r}; rename one.")
    return chosen
