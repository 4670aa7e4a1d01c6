"""Which files are text to train on, told by their content: none is left out, or taken for text, without a word.

Read are .txt and .md (one document a file), JSON lines or one list of objects in .jsonl, .ndjson, .jsonlines or .json
(one a line or object) and .csv or .tsv, plain or packed as .xz, .gz, .zst or .bz2, whatever the name says of the
packing; a .txt of JSON lines with the text field is JSON lines. Parquet and Arrow are known by their first bytes, under
any name.
What else lies in a folder is listed for the user, and refused where it holds data of a kind that is not read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from parallel.errors import DataError
from pipeline.config.patterns import fits, is_pattern, split_pattern
from pipeline.data.packed import PACKINGS, begins_packed, opened, packing_of
from pipeline.data.schemas import schema_of
from pipeline.data.shards import is_prepared
from pipeline.data.tables import ARROW, CSV, PARQUET, TABLE_ENDINGS, table_of
from pipeline.reporting.words import counted
from pipeline.storage.lfs import MAX_POINTER, is_pointer, pointer_sentence

TEXT, LINES, LIST = ".txt", ".jsonl", "JSON list"
MARKDOWN = (".md", ".markdown")
"""Text where nothing else is; beside other text notes on it."""
_KINDS = {
    **dict.fromkeys((TEXT, *MARKDOWN), TEXT),
    **dict.fromkeys((LINES, ".ndjson", ".jsonlines", ".json"), LINES),
}
_NOTES = ("readme", "license", "licence", "changelog", "contributing", "notice", "code_of_conduct")
"""What Markdown about a folder begins with; the Hub's data sets describe themselves in it."""
ENDINGS = (
    *(kind + packing for kind in (TEXT, LINES) for packing in ("", *(f".{name}" for name in PACKINGS))),
    *TABLE_ENDINGS,
)
"""What messages name."""
SPLITS = "dataset_dict.json"
"""What `datasets` writes beside the folders of several splits."""
BOM = b"\xef\xbb\xbf"
INDEX_MAGIC = b"MMIDIDX\0\0"
"""Of Megatron's .idx, see `token_files`."""
HEAD = 4096
"""Bytes of a file's beginning that are looked at."""
LONGEST_LINE = 1 << 26
"""Bytes of a first line that is parsed to see whether it is a record."""
LISTED = 8
"""Names of unread files in a message; the others are counted."""

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
_SPLIT = re.compile(r"((?:train|test|validation|valid|dev|eval)\w*)[-.]\d{5}-of-\d{5}\b")
"""Names of files as the Hub's data sets have them."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class TextFile:
    """A file that is read."""

    path: Path
    kind: str
    """`TEXT` (one document), `LINES` (one a line), `LIST` (one an object), or one of `tables.TABLES` (one a row)."""
    packing: str
    """See `packing_of`."""

    @property
    def compressed(self) -> bool:
        """Whether it may hold more text than it has bytes."""
        return bool(self.packing) or self.kind in (PARQUET, ARROW)


@dataclass(frozen=True)
class TextFiles:
    """What a file or folder holds."""

    root: Path
    """As it was asked for; of a pattern the folder above it."""
    files: tuple[TextFile, ...]
    """Sorted by relative path."""
    unread: tuple[str, ...]
    """Relative paths of other files, and folders of prepared tokens, sorted; hidden ones are not among them."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what is not read, and on what is and may not be meant."""
        found = []
        if self.unread:
            count = len(self.unread)
            found.append(f"{self.root}: {counted(count, 'file is', 'files are')} not read: {_listed(self.unread)}.")
        return (*found, *splits_of(self.root, [file.path for file in self.files]))


def splits_of(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """A sentence where files are of several splits of a data set, as the Hub names them."""
    found = {match[1]: file for file in files if (match := _SPLIT.match(file.name))}
    if len(found) < 2:
        return ()
    split = next((name for name in sorted(found) if name.startswith("train")), min(found))
    only = found[split].with_name(f"{split}-*{found[split].suffix}")
    return (
        f"{root}: holds the splits {', '.join(sorted(found))} of a data set (by the names of its files), and all of "
        f"them are read; name those to train on, e.g. '{only}', if not all are.",
    )


def _listed(found: tuple[str, ...]) -> str:
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more


class _Unread(Exception):
    """A file is not read; its message says of data why (empty: it is no data)."""


def find_texts(path: Path, text_field: str = "text") -> TextFiles:
    """Every readable file at or below `path`, or that it matches; hidden files and folders are skipped.

    Links to folders are followed, each real folder once.

    Args:
        text_field: key of the text in JSON records, by which a single record is told from other JSON.

    Raises:
        DataError: `path` is missing or holds nothing to read; or a file there holds data of a kind that is not read, is
            a Git LFS pointer, or is not the UTF-8 text that its name says.
    """
    accepted = ", ".join(ENDINGS)
    if path.is_file():
        try:
            return TextFiles(path, (_look(path, text_field),), ())
        except _Unread as reason:
            problem = str(reason) or f"is not one of {accepted}, or not what they hold; rename or convert it"
            raise DataError(f"{path}: {problem}.") from None
    root, walked = path, matched(path)
    if walked is not None:
        root = split_pattern(path)[0]
    elif path.is_dir():
        walked = walk(path)
    else:
        raise DataError(f"{path}: no such file or folder; point it at text ({accepted}).")
    found: list[TextFile] = []
    unread: list[tuple[tuple[str, ...], str]] = []
    data: list[tuple[tuple[str, ...], str]] = []
    for file in walked:
        parts = file.relative_to(root).parts
        try:
            if file.is_dir() or _is_note(file):  # prepared tokens, or about the data
                raise _Unread
            found.append(_look(file, text_field))
        except _Unread as reason:
            unread.append((parts, file.relative_to(root).as_posix()))
            if str(reason):
                data.append((parts, f"{file}: {reason}"))
    texts = [one for one in found if ending_of(one.path.name)[0] not in MARKDOWN]
    if texts:
        notes = [one.path.relative_to(root) for one in found if ending_of(one.path.name)[0] in MARKDOWN]
        found, unread = texts, unread + [(note.parts, note.as_posix()) for note in notes]
    left = tuple(name for _, name in sorted(unread))
    if data:
        more = f" (as {counted(len(data) - 1, 'other file')} there)" if len(data) > 1 else ""
        raise DataError(f"{min(data)[1]}, or move it away{more}.")
    if not found:
        others = f" (there are {_listed(left)})" if left else ""
        raise DataError(f"{path}: holds no file ending in {accepted}{others}; add text or point somewhere else.")
    return TextFiles(root, tuple(sorted(found, key=lambda file: file.path.relative_to(root).parts)), left)


def _is_note(file: Path) -> bool:
    return ending_of(file.name)[0] in MARKDOWN and file.name.lower().startswith(_NOTES)


def matched(path: Path) -> list[Path] | None:
    """The files that a pattern matches, not hidden ones, sorted by relative path; None: `path` is no pattern.

    Raises:
        DataError: it matches none.
    """
    if not is_pattern(path):
        return None
    root, pattern = split_pattern(path)
    if not root.is_dir():
        raise DataError(f"{path}: matches no file, as there is no folder {root}; mend the pattern.")
    below = walk(root, pattern)
    all_of = [file for file in below if fits(file.relative_to(root).parts, pattern)]
    files = [file for file in all_of if not file.is_dir()]
    if not files:
        folders = f" (but {all_of[0]}, a folder of prepared tokens; name it alone)" if all_of else ""
        raise DataError(
            f"{path}: matches no file{folders}; mend the pattern (* stands for part of a name, ** for folders at any "
            "depth, and hidden files are never meant)."
        )
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def matches_of(path: Path) -> str:
    """One sentence on what a pattern matches; empty: `path` is none.

    Raises:
        DataError: it matches nothing.
    """
    files = matched(path)
    if files is None:
        return ""
    names = tuple(file.relative_to(split_pattern(path)[0]).as_posix() for file in files)
    return f"{path} matches {counted(len(files), 'file')}: {_listed(names)}."


def walk(path: Path, pattern: tuple[str, ...] = ()) -> list[Path]:
    """Files below a folder, and its folders of prepared tokens, which are not entered.

    Args:
        pattern: parts of one, which chooses among splits too; what lies deeper than a folder below it is not looked
            for. (): there is none.

    Raises:
        DataError: it cannot be listed, or holds the splits of one dataset.
    """
    deepest = len(pattern) if pattern and "**" not in pattern else None
    found: list[Path] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in visited or is_prepared(Path(folder)):
            if real not in visited:
                found.append(Path(folder))
            subfolders.clear()
            continue
        visited.add(real)
        if SPLITS in names and not pattern:
            splits = sorted(subfolders)
            raise DataError(
                f"{folder}: holds the splits {', '.join(splits)} of a dataset, which are not all to be trained on; "
                f"name one, e.g. {Path(folder, splits[0] if splits else 'train')}."
            )
        # Sorted also while walking: which of two links to one folder is visited first must not depend on the disk.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if deepest is not None and len(Path(folder).relative_to(path).parts) >= deepest:
            subfolders.clear()
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return found


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions.") from error


def ending_of(name: str) -> tuple[str, bool]:
    """A file name's ending without that of a packing, in lower case, and whether it had one."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    packed = bool(suffixes) and suffixes[-1].removeprefix(".") in PACKINGS
    rest = suffixes[:-1] if packed else suffixes
    return (rest[-1] if rest else ""), packed


def _look(file: Path, text_field: str) -> TextFile:
    """What a file is.

    Raises:
        DataError: it cannot be read, or is not what its name says.
        _Unread: it is not one that is read.
    """
    ending, named_packed = ending_of(file.name)
    kind = _KINDS.get(ending)
    named = kind is not None or ending in TABLE_ENDINGS
    if not file.is_file():  # a pipe would be waited for, a link to nothing is nothing
        if not named:
            raise _Unread
        if file.exists():
            raise DataError(f"{file}: is a pipe or a device, not a file; write what it gives into one.")
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        if not named and ending not in _DATA_ENDINGS:
            raise _Unread from None
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); mend or remove it.") from error
    if is_pointer(head) and (named or ending in _DATA_ENDINGS or named_packed):
        raise DataError(pointer_sentence(file))
    packing = packing_of(head)
    if named and named_packed and not packing and (begins_packed(head) or not _is_text(head)):
        raise DataError(f"{file}: the archive is truncated or corrupt (it does not begin as one); copy it again.")
    if packing:
        try:
            with opened(file, packing) as (_, unpacked):
                head = unpacked.read(HEAD)
        except DataError:
            if named:
                raise
    table = table_of(head, ending)
    if table and table != CSV:
        if packing:
            raise _Unread(f"is {table} packed as {packing}; unpack it")
        return TextFile(file, table, "")
    # Where a .csv holds JSON, the content decides.
    kind = table or (LINES if TABLE_ENDINGS.get(ending) == CSV else kind)
    _refuse_data(file, head, ending, kind)
    if kind is None:
        raise _Unread
    if kind == CSV:
        return TextFile(file, CSV, packing)
    if kind == LINES and head.removeprefix(BOM).lstrip()[:1] == b"[":
        if head.removeprefix(BOM).lstrip()[1:].lstrip()[:1] not in (b"{", b"]", b""):
            raise _Unread("holds a JSON list of something else than objects; convert it")
        return TextFile(file, LIST, packing)
    if ending in (TEXT, ".json"):
        records = _first_records(file, packing, head)
        lone = len(records) == 1 and not isinstance(records[0].get(text_field), str)
        if ending == TEXT:
            # A text may begin with a brace, or with one line of JSON.
            kind = LINES if records and isinstance(records[0].get(text_field), str) else TEXT
        elif head.strip() and (not records or lone):
            if lone and schema_of(records[0]) is not None:
                raise _Unread("holds a conversation; prepare it with tools.prepare_data --chat")
            raise _Unread
    return TextFile(file, kind, packing)


def _refuse_data(file: Path, head: bytes, ending: str, kind: str | None) -> None:
    """Raise for what is not UTF-8 text by its first bytes, or data by its ending."""
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if head.startswith(INDEX_MAGIC):
        raise _Unread("is a Megatron index, which is not read among text; prepare it alone, with tools.prepare_data")
    if head[257:262] == b"ustar":
        found = "a tar archive"
    if found is None and kind is None:
        found = _DATA_ENDINGS.get(ending)
    if found is not None:
        how = "unpack it" if "archive" in found or "packed" in found else f"convert it to {LINES} or {TEXT}"
        how += " (token ids: tools.prepare_data --tokens)" if ending == ".bin" else ""
        raise _Unread(f"is {found}, which is not read; {how}")
    if kind is None and ending in TABLE_ENDINGS:
        raise _Unread(f"is not the {TABLE_ENDINGS[ending]} that its name says (it does not begin so); copy it again")
    if kind is None:
        return
    if head.startswith(_UTF16):
        coding = "UTF-32" if head[2:4] == b"\0\0" else "UTF-16"
        raise DataError(f"{file}: is {coding} text, not UTF-8; convert it, e.g. with iconv -f {coding} -t UTF-8.")
    if b"\0" in head:
        raise DataError(f"{file}: is no text (it has NUL bytes); convert it to UTF-8 text, or move it away.")


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


def _two_lines(stream: IO[bytes]) -> list[bytes]:
    lines: list[bytes] = []
    while len(lines) < 2 and (line := stream.readline(LONGEST_LINE)):
        line = line if lines else line.removeprefix(BOM)
        lines += [line] if line.strip() else []
    return lines


assert HEAD >= MAX_POINTER
