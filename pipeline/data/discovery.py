"""Which files are text to train on, told by their content: none is left out, or taken for text, without a word.

A file that the user names is taken whatever its name (`kinds`). Of a folder, or of what a pattern matches, those are
that end as text, JSON and tables do, or begin as Parquet or Arrow; what else lies there is listed for the user, and
refused where it holds data of a kind that is not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import DataError
from pipeline.config.patterns import fits, is_pattern, split_pattern
from pipeline.data.kinds import LINES, MARKDOWN, TEXT, TextFile, Unread, accepted, ending_of, look
from pipeline.data.shards import is_prepared
from pipeline.reporting.words import counted

_NOTES = ("readme", "license", "licence", "changelog", "contributing", "notice", "code_of_conduct")
"""What Markdown about a folder begins with; the Hub's data sets describe themselves in it."""
SPLITS = "dataset_dict.json"
"""What `datasets` writes beside the folders of several splits."""
READ = accepted(TEXT, LINES)
"""What messages name."""
LISTED = 8
"""Names of unread files in a message; the others are counted."""

_SPLIT = re.compile(r"((?:train|test|validation|valid|dev|eval)\w*)[-.]\d{5}-of-\d{5}\b")
"""Names of files as the Hub's data sets have them."""


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
            found.append(f"{self.root}: {counted(count, 'file is', 'files are')} not read: {listed(self.unread)}.")
        found += [file.doubt for file in self.files if file.doubt]
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


def listed(found: tuple[str, ...]) -> str:
    """Some names, for a message, and how many others there are."""
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more


def find_texts(path: Path, text_field: str = "text") -> TextFiles:
    """Every readable file at or below `path`, or that it matches; hidden files and folders are skipped.

    Links to folders are followed, each real folder once.

    Args:
        text_field: key of the text in JSON records, by which a single record is told from other JSON.

    Raises:
        DataError: `path` is missing or holds nothing to read; or a file there holds data of a kind that is not read, is
            a Git LFS pointer, or is not the UTF-8 text that its name says.
    """
    if path.is_file():
        try:
            return TextFiles(path, (look(path, text_field, asked=True),), ())
        except Unread as reason:
            problem = str(reason) or f"is not one of {READ}, or not what they hold; convert it"
            if not str(reason) and ending_of(path.name)[0] == ".json":
                problem = f'holds neither a list of objects nor one {{"{text_field}": ...}} a line; write it as either'
            raise DataError(f"{path}: {problem}.") from None
    root, walked = path, matched(path)
    if walked is not None:
        root = split_pattern(path)[0]
    elif path.is_dir():
        walked = walk(path)
    else:
        raise DataError(f"{path}: no such file or folder; point it at text ({READ}).")
    found: list[TextFile] = []
    unread: list[tuple[tuple[str, ...], str]] = []
    data: list[tuple[tuple[str, ...], str]] = []
    for file in walked:
        parts = file.relative_to(root).parts
        try:
            if file.is_dir() or _is_note(file):  # prepared tokens, or about the data
                raise Unread
            found.append(look(file, text_field))
        except Unread as reason:
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
        if left and all((root / name).is_dir() for name in left):  # longspan prepare --held-out
            raise DataError(
                f"{path}: holds prepared folders ({listed(left)}) and no text; name one of them: {root / left[0]}."
            )
        others = f" (there are {listed(left)})" if left else ""
        raise DataError(f"{path}: holds no file ending in {READ}{others}; add text or point somewhere else.")
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
    return f"{path} matches {counted(len(files), 'file')}: {listed(names)}."


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
