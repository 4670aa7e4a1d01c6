"""Records of conversations as files hold them: JSON lines, one JSON list or a table.

A file that cannot be read, or that mixes schemas, is a `DataError`; what a record says is read in `conversations`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from pipeline.data.discovery import listed, matched, walk
from pipeline.data.json_list import read_objects
from pipeline.data.kinds import BOM, HEAD, LINES, accepted, ending_of, holds_records, refuse_utf16
from pipeline.data.packed import opened, packing_of
from pipeline.data.schemas import COLUMNS, LISTS, PAIR, SEGMENTS, NoSchema, schema_of
from pipeline.data.tables import CSV, TABLE_ENDINGS, open_table, table_of
from pipeline.reporting.words import counted
from pipeline.storage.lfs import refuse_pointer

_READ = accepted(LINES)
"""What messages name."""
_NOTES = ("dataset_info.json", "dataset_infos.json", "state.json")
"""What `datasets` writes beside its tables."""
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")
"""How a list of messages begins, as JSON or as Python prints it."""
Columns = Mapping[str, str]
"""The record's own key by the known one that it is read as; empty: the known ones are read."""
AS_NAMED: Columns = {}


@dataclass(frozen=True)
class Record:
    """A JSON object or a row, and its place."""

    value: dict[str, Any]
    """A row has all columns of its table; None stands for what is missing, and for what is not read."""
    file: Path
    number: int
    """1-based line of JSON lines and CSV, position in a list, or row."""
    unit: str
    """`line`, `record` or `row`."""
    schema: str = ""
    """See `schema_of`."""

    @property
    def where(self) -> str:
        """Place, for messages."""
        return f"{self.file}: {self.unit} {self.number}"


def conversation_files(path: Path) -> list[Path]:
    """The file, or the JSON files and tables of a folder or pattern (not hidden ones), sorted by relative path.

    Raises:
        DataError: there is none.
    """
    return _divided(path)[0]


def passed_over(path: Path) -> tuple[str, ...]:
    """One sentence that names the files at a path that are not read as conversations, or none.

    Raises:
        DataError: see `conversation_files`.
    """
    others = _divided(path)[1]
    return (f"{path}: {counted(len(others), 'file is', 'files are')} not read: {listed(others)}.",) if others else ()


def _divided(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """`conversation_files`, and the names of the other files there; of `datasets`' own notes nothing is said."""
    if path.is_file():
        return [path], ()
    walked = matched(path)
    if walked is None and not path.is_dir():
        raise DataError(f"{path}: no such file or folder; point it at conversations ({_READ}).")
    found: list[Path] = []
    others: list[str] = []
    for file in sorted(walk(path)) if walked is None else walked:
        # A folder of prepared tokens may lie inside.
        if holds_records(file.name) and file.name not in _NOTES and file.is_file():
            found.append(file)
        elif file.name not in _NOTES:
            others.append(file.name if walked is not None else file.relative_to(path).as_posix())
    if not found:
        there = f" (there are {listed(tuple(others))})" if others else ""
        raise DataError(f"{path}: holds no conversations (no file ending in {_READ}){there}.")
    return found, tuple(others)


def read_records(file: Path, columns: Columns = AS_NAMED) -> Iterator[Record]:
    """The records of one file, all of one schema.

    Args:
        columns: what is read as what, and nothing else.

    Raises:
        DataError: it cannot be read, is not JSON, none of its records has one of the columns, or its records are of
            several schemas or of none; the message names the line.
    """
    first: Record | None = None
    missing = set(columns.values())
    for record in _objects(file, columns):
        value = record.value
        if columns:
            missing -= value.keys()
            value = {known: value[own] for known, own in columns.items() if own in value}
        try:
            schema = schema_of(value, first.schema if first else None)
        except NoSchema as error:
            reason = str(error)
            if missing:
                keys = ", ".join(record.value) or "nothing"
                reason = f"has no {', '.join(sorted(missing))}, which --columns names (it has {keys}); correct the name"
            elif not columns and (inside := _records_inside(value)) is not None:
                reason = f"is no conversation but has a list of them in {inside!r}; write that list alone into a file"
            elif columns:
                reason = f"is not what --columns says: read so, it {reason}"
            raise DataError(f"{record.where} {reason}.") from None
        record = Record(value, file, record.number, record.unit, schema)
        first = first or record
        if schema != first.schema:
            raise DataError(
                f"{record.where} is of the schema {schema}, {first.unit} {first.number} of {first.schema}; split the "
                "file."
            )
        yield record
    if first is not None and missing:
        raise DataError(f"{file}: no record has {', '.join(sorted(missing))}, which --columns names; correct the name.")


def _records_inside(value: Mapping[str, Any]) -> str | None:
    """The first key under which an object has a list of records; None: there is none."""
    for key, inside in value.items():
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            try:
                schema_of(inside[0])
            except NoSchema:
                continue
            return key
    return None


def _objects(file: Path, columns: Columns) -> Iterator[Record]:
    refuse_pointer(file, DataError)
    try:
        with file.open("rb") as raw:
            head = raw.read(HEAD)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); mend or remove it.") from error
    packing = packing_of(head)
    if packing:
        with opened(file, packing) as (_, stream):
            head = stream.read(HEAD)
    refuse_utf16(file, head)
    table = table_of(head, ending_of(file.name)[0])
    if table:
        if packing and table != CSV:
            raise DataError(f"{file}: is {table} packed as {packing}; unpack it.")
        yield from _rows(file, table, packing, columns)
        return
    if TABLE_ENDINGS.get(ending_of(file.name)[0], CSV) != CSV:
        raise DataError(
            f"{file}: does not begin as the {TABLE_ENDINGS[ending_of(file.name)[0]]} of its name; copy it again."
        )
    with opened(file, packing) as (_, stream):
        if head.removeprefix(BOM).lstrip().startswith(b"["):
            for place, value in read_objects(stream, file):
                yield Record(value, file, place, "record")
            return
        first = True
        for number, line in enumerate(stream, 1):
            if line.removeprefix(BOM).strip():
                if first and _goes_on(line):
                    raise DataError(
                        f"{file}: begins with an object over several lines, and JSON is read as one object a line or "
                        "as one list of them; write it so, for example with jq -c . FILE."
                    )
                yield _record(_parsed(line, f"{file}: line {number}"), file, number)
                first = False


def _goes_on(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON object that ends in a later one."""
    text = line.decode("utf-8-sig", "replace").strip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # Of an object that is cut in a string the error is where that begins: such a file is truncated.
        return text.startswith("{") and error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _rows(file: Path, kind: str, packing: str, columns: Columns) -> Iterator[Record]:
    lists, pair = ({columns.get(name, name) for name in names} for names in ((*LISTS, SEGMENTS, "history"), PAIR))
    with open_table(file, kind, packing) as table:
        nothing = dict.fromkeys(table.columns)
        for number, row in table.rows(tuple(columns.values()) or COLUMNS):
            for name in sorted((lists | pair) & row.keys()):
                text = row[name]
                # As CSV holds lists; a prompt or completion may be text as well.
                if isinstance(text, str) and text and (name in lists or _MESSAGES.match(text)):
                    row[name] = _parsed(
                        text.encode("utf-8", "surrogatepass"), f"{file}: {table.unit} {number}, {name},"
                    )
            yield Record({**nothing, **row}, file, number, table.unit)


def _record(value: Any, file: Path, number: int) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{file}: line {number} is not a JSON object; mend or remove it.")
    return Record(value, file, number, "line")


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON in UTF-8 ({reason}); mend or remove it.") from error
