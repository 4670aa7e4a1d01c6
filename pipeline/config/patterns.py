"""Patterns in place of a path of text: `books/*.txt`, and with `**` at any depth: `books/**/*.txt`. No torch."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

_MARKS = re.compile(r"[*?\[]")


def is_pattern(path: str | Path) -> bool:
    """Whether a path holds `*`, `?` or `[`, and nothing has this very name."""
    return bool(_MARKS.search(str(path))) and not Path(path).exists()


def split_pattern(path: str | Path) -> tuple[Path, tuple[str, ...]]:
    """The folder above the first part that has such a mark, and the parts from there on."""
    parts = Path(path).parts
    first = next((place for place, part in enumerate(parts) if _MARKS.search(part)), len(parts))
    return Path(*parts[:first]), parts[first:]


def fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path below that folder, in parts, is what those of a pattern say, as in a shell and in `glob`.

    `*`, `?` and `[...]` stand for characters of one part, `**` alone for any number of folders, none too, and at the
    end for all files below.
    """
    if not pattern or not names:
        return not pattern and not names
    first, *rest = pattern
    if first == "**":
        return not rest or fits(names, tuple(rest)) or fits(names[1:], pattern)
    return fnmatchcase(names[0], first) and fits(names[1:], tuple(rest))
