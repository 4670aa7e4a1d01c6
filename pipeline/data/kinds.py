"""What one file is, told by its content: compression, tables and JSON by how they begin, else UTF-8 text.

The ending of a name decides which files of a folder are looked at, and little else: CSV has no mark of its own.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from parallel.errors import DataError
from pipeline.data.packed import PACKINGS, begins_packed, opened, packing_of
from pipeline.data.schemas import is_conversation
from pipeline.data.tables import ARROW, CSV, PARQUET, SEPARATORS, TABLE_ENDINGS, table_of
from pipeline.storage.lfs import MAX_POINTER, is_pointer, pointer_sentence

TEXT, LINES, LIST = ".txt", ".jsonl", "JSON list"
MARKDOWN = (".md", ".markdown")
"""Text where nothing else is; beside other text notes on it."""
_KINDS = {
    **dict.fromkeys((TEXT, *MARKDOWN), TEXT),
    **dict.fromkeys((LINES, ".ndjson", ".jsonlines", ".json"), LINES),
}
BOM = b"\xef\xbb\xbf"
INDEX_MAGIC = b"MMIDIDX\0\0"
"""Of Megatron's .idx, see `token_files`."""
HEAD = 4096
"""Bytes of a file's beginning that are looked at."""
LONGEST_LINE = 1 << 26
"""Bytes of a first line that is parsed to see whether it is a record."""
_MAGIC = {
    b"PARE": "encrypted Parquet",
    b"FEA1": "the first version of Feather",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "packed with lz4",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x93NUMPY": "NumPy arrays",
    b"Obj\x01": "Avro",
}
_DATA_ENDINGS = {
    **dict.fromkeys((".bin", ".idx", ".npy", ".npz", ".pt", ".pkl", ".pickle"), "binary data"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive"),
    **dict.fromkeys((".orc", ".avro", ".tfrecord", ".mds"), "data of a kind"),
}
_NAME = re.compile(r"\w[\w .:/-]{0,63}")
"""Of a column."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class TextFile:
    """A file that is read."""

    path: Path
    kind: str
    """`TEXT` (one document), `LINES` (one a line), `LIST` (one an object), or one of `tables.TABLES` (one a row)."""
    packing: str
    """See `packing_of`."""
    doubt: str = ""
    """A sentence on what may not be meant; empty: all is clear."""

    @property
    def compressed(self) -> bool:
        """Whether it may hold more text than it has bytes."""
        return bool(self.packing) or self.kind in (PARQUET, ARROW)


class Unread(Exception):
    """A file is not read; its message says of data why (empty: it is no data)."""


def ending_of(name: str) -> tuple[str, bool]:
    """A file name's ending without that of a packing, in lower case, and whether it had one."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    packed = bool(suffixes) and suffixes[-1].removeprefix(".") in PACKINGS
    rest = suffixes[:-1] if packed else suffixes
    return (rest[-1] if rest else ""), packed


def accepted(*kinds: str) -> str:
    """The endings of files that are read, for messages.

    Args:
        kinds: `TEXT`, `LINES`, or both; tables always are.
    """
    plain = [ending for ending, kind in _KINDS.items() if kind in kinds]
    plain += [ending for ending, kind in TABLE_ENDINGS.items() if kind == CSV]
    others = [ending for ending, kind in TABLE_ENDINGS.items() if kind != CSV]
    packed = ", ".join(f".{name}" for name in PACKINGS)
    return f"{', '.join(plain)} (each also packed: {packed}), {', '.join(others)}"


def holds_records(name: str) -> bool:
    """Whether a file of that name may hold JSON or a table, by its ending."""
    ending, _ = ending_of(name)
    return _KINDS.get(ending) == LINES or ending in TABLE_ENDINGS


def look(file: Path, text_field: str, asked: bool = False) -> TextFile:
    """What a file is.

    Args:
        text_field: key of the text in JSON records.
        asked: the user named this very file, so that its name does not matter.

    Raises:
        DataError: it cannot be read, or is not what its name says.
        Unread: it is not one that is read.
    """
    ending, named_packed = ending_of(file.name)
    kind = _KINDS.get(ending)
    named = kind is not None or ending in TABLE_ENDINGS
    if not file.is_file():  # a pipe would be waited for, a link to nothing is nothing
        if not named:
            raise Unread
        if file.exists():
            raise DataError(f"{file}: is a pipe or a device, not a file; write what it gives into one.")
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        if not (named or asked) and ending not in _DATA_ENDINGS:
            raise Unread from None
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); mend or remove it.") from error
    if is_pointer(head) and (named or asked or ending in _DATA_ENDINGS or named_packed):
        raise DataError(pointer_sentence(file))
    packing = packing_of(head)
    if named and named_packed and not packing and (begins_packed(head) or not _is_text(head)):
        raise DataError(f"{file}: the archive is truncated or corrupt (it does not begin as one); copy it again.")
    if packing:
        try:
            with opened(file, packing) as (_, unpacked):
                head = unpacked.read(HEAD)
        except DataError:
            if named or asked:
                raise
    table = table_of(head, ending)
    if table and table != CSV:
        if packing:
            raise Unread(f"is {table} packed as {packing}; unpack it")
        return TextFile(file, table, "")
    # Where a .csv holds JSON, the content decides.
    kind = table or (LINES if TABLE_ENDINGS.get(ending) == CSV else kind)
    if asked and not named and (_is_text(head) or head.startswith(_UTF16)):
        kind = TEXT
    _refuse_data(file, head, ending, kind)
    if kind is None:
        raise Unread
    if kind == CSV or ending in MARKDOWN:
        return TextFile(file, kind, packing)
    return _json_or_text(file, kind, packing, head, text_field, ending)


def _json_or_text(file: Path, kind: str, packing: str, head: bytes, text_field: str, ending: str) -> TextFile:
    """What a file of text is, which its name takes for JSON (`LINES`) or does not (`TEXT`); see `look`."""
    begin = head.removeprefix(BOM).lstrip()
    if begin[:1] == b"[":
        if kind == LINES and begin[1:].lstrip()[:1] not in (b"{", b"]", b""):
            raise Unread("holds a JSON list of something else than objects; convert it")
        first = _first_of_list(file, packing, begin) if kind == TEXT else None
        if kind == LINES or (first is not None and isinstance(first.get(text_field), str)):
            return TextFile(file, LIST, packing)
        records = [first] if first is not None else []
    else:
        # A .jsonl is read line by line, whatever they hold.
        records = _first_records(file, packing, head) if kind == TEXT or ending == ".json" else []
    has_text = bool(records) and isinstance(records[0].get(text_field), str)
    if (kind == TEXT or len(records) == 1) and records and not has_text and is_conversation(records[0]):
        held = "a conversation" if len(records) == 1 and kind == LINES else "conversations"
        raise Unread(f"holds {held}; prepare {'it' if held[0] == 'a' else 'them'} with longspan prepare --chat")
    if kind == TEXT:
        # A text may begin with a brace, or with one line of JSON. JSON of an unknown name is read, or refused, as such.
        if has_text or (len(records) > 1 and ending not in _KINDS):
            return TextFile(file, LINES, packing)
        return TextFile(file, TEXT, packing, _like_csv(file, head, text_field))
    if ending == ".json" and head.strip() and (not records or (len(records) == 1 and not has_text)):
        raise Unread
    return TextFile(file, kind, packing)


def _refuse_data(file: Path, head: bytes, ending: str, kind: str | None) -> None:
    """Raise for what is not UTF-8 text by its first bytes, or data by its ending."""
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if head.startswith(INDEX_MAGIC):
        raise Unread("is a Megatron index, which is not read among text; prepare it alone, with longspan prepare")
    if head[257:262] == b"ustar":
        found = "a tar archive"
    if found is None and kind is None:
        found = _DATA_ENDINGS.get(ending)
    if found is not None:
        how = "unpack it" if "archive" in found or "packed" in found else f"convert it to {LINES} or {TEXT}"
        how += " (token ids: longspan prepare --tokens)" if ending == ".bin" else ""
        raise Unread(f"is {found}, which is not read; {how}")
    if kind is None and ending in TABLE_ENDINGS:
        raise Unread(f"is not the {TABLE_ENDINGS[ending]} that its name says (it does not begin so); copy it again")
    if kind is None:
        return
    refuse_utf16(file, head)
    if head.startswith(b"%PDF-"):
        raise DataError(f"{file}: is a PDF, whatever its name; convert it to text, e.g. with pdftotext.")
    if b"\0" in head:
        raise DataError(f"{file}: is no text (it has NUL bytes); convert it to UTF-8 text, or move it away.")


def refuse_utf16(file: Path, head: bytes) -> None:
    """Raise for text that begins with the byte order mark of another encoding than UTF-8.

    Raises:
        DataError: names it.
    """
    if head.startswith(_UTF16):
        coding = "UTF-32" if head[2:4] == b"\0\0" else "UTF-16"
        raise DataError(f"{file}: is {coding} text, not UTF-8; convert it, e.g. with iconv -f {coding} -t UTF-8.")


def _is_text(head: bytes) -> bool:
    """Whether bytes are the beginning of UTF-8 text; the last character may be cut."""
    try:
        head[: -3 if len(head) == HEAD else None].decode("utf-8")
    except UnicodeDecodeError as error:
        return len(head) == HEAD and error.start >= HEAD - 6
    return b"\0" not in head


def _first_records(file: Path, packing: str, head: bytes) -> list[dict[str, Any]]:
    """The first two lines that are not blank, as JSON objects; nothing where they are something else."""
    if not head.removeprefix(BOM).lstrip().startswith(b"{"):
        return []
    with opened(file, packing) as (_, stream):
        lines = _two_lines(stream)
    try:
        found = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return []
    return found if all(isinstance(record, dict) for record in found) else []


def _first_of_list(file: Path, packing: str, begin: bytes) -> dict[str, Any] | None:
    """The first object of a JSON list; None: the file holds none."""
    if begin[1:].lstrip()[:1] != b"{":
        return None
    data = b""
    with opened(file, packing) as (_, stream):
        for size in (HEAD, 1 << 18, LONGEST_LINE):
            data += stream.read(size - len(data))
            text = data.decode("utf-8-sig", "ignore").lstrip()[1:].lstrip()
            try:
                found, _ = json.JSONDecoder().raw_decode(text)
                return found if isinstance(found, dict) else None
            except (ValueError, RecursionError):  # or it is cut
                if len(data) < size:
                    return None
    return None


def _like_csv(file: Path, head: bytes, text_field: str) -> str:
    """A sentence where text begins as a table with that column does; empty: it does not."""
    lines = head.decode("utf-8-sig", "ignore").splitlines(keepends=True)
    for separator in SEPARATORS:
        rows: list[list[str]] = []
        try:
            rows.extend(csv.reader(lines[: -1 if len(head) == HEAD else None], delimiter=separator, strict=True))
        except csv.Error:  # no table, or its last field is cut
            pass
        header, *others = rows or [[]]
        named = len(header) > 1 and text_field in header and all(map(_NAME.fullmatch, header))
        if named and others and all(len(row) == len(header) for row in others if row):
            return (
                f"{file}: begins as CSV with a column {text_field!r} and is read as one document; rename it to .csv if "
                "its rows are the documents."
            )
    return ""


def _two_lines(stream: IO[bytes]) -> list[bytes]:
    lines: list[bytes] = []
    while len(lines) < 2 and (line := stream.readline(LONGEST_LINE)):
        line = line if lines else line.removeprefix(BOM)
        lines += [line] if line.strip() else []
    return lines


assert HEAD >= MAX_POINTER
