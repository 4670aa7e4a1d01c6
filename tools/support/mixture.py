"""Training text to compare with books alone: mixed with program code, and with notes that the text refers back to.

What came of it is in docs/RESULTS.md.

Code, which names things and uses them far below, is what ProLong (arXiv 2410.02660, section 4) mixes with books. Notes
and their recalls are in the spirit of arXiv 2406.19292: made-up facts, asked for further down. Their words are not
those of any task here that judges retrieval.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import ConfigError, DataError
from pipeline.data.records import RecordReader
from pipeline.storage.durable import replace_text

NEAREST, FARTHEST = 400, 100_000
"""Characters between a note and its recall: the logarithm is drawn evenly."""
TEXT_FILE, CODE_FILE = "text.jsonl", "code.jsonl"
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}

_PEOPLE = (
    "Adela Anton Berta Casper Dorothea Edmund Felicia Gregor Harriet Ignaz Josephine Konrad Lavinia Matthias Nora "
    "Oskar Philippa Quentin Rosalind Stefan Theodora Ulrich Viola Wendelin"
).split()
_KINDS = (
    ("the house number of {who}", 1, 4),
    ("the weight of the parcel for {who} in grams", 3, 5),
    ("the sum that {who} owes", 2, 6),
    ("the year in which {who} was born", 4, 4),
    ("the number of {who}'s ticket", 3, 7),
    ("the page on which {who} stopped reading", 1, 3),
    ("the height of the hill behind {who}'s farm in feet", 3, 4),
    ("the count of apples in {who}'s cellar", 2, 4),
)
_COLOURS = "white black red green blue yellow brown grey purple orange golden silver".split()
_NOTES = ("Note: {what} is {value}.", "Bear in mind that {what} is {value}.", "By the way, {what} is {value}.")
_RECALLS = (
    "As was noted, {what} is {value}.",
    "Question: what is {what}? Answer: {value}",
    "Q: Do you remember {what}?\n\nA: Yes, it is {value}.",
    "To come back to it: {what} is {value}.",
)


@dataclass(frozen=True)
class Mixture:
    """What is mixed with the text."""

    code: float = 0.0
    """Share of all characters that are code, in [0, 1)."""
    notes: int = 0
    """Characters of text between two notes, on average; 0: none."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.code < 1:
            raise ConfigError(f"code: {self.code} is no share in [0, 1).")
        if self.notes and self.notes < 200:
            raise ConfigError(f"notes: one every {self.notes} characters leaves no text between; use 200 or more.")


def facts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(what, value) without end: none comes again before all others have."""
    while True:
        subjects = [(kind, who) for kind in (*_KINDS, None) for who in _PEOPLE]
        rng.shuffle(subjects)
        for kind, who in subjects:
            if kind is None:
                yield f"the colour of {who}'s front door", rng.choice(_COLOURS)
            else:
                words, fewest, most = kind
                digits = rng.randint(fewest, most)
                yield words.format(who=who), str(rng.randrange(10 ** (digits - 1), 10**digits))


def with_notes(text: str, every: int, rng: random.Random) -> str:
    """The text with notes, and below each its recall, between its paragraphs.

    Args:
        text: paragraphs, an empty line between two.
        every: characters between two notes, on average.
    """
    inserted: list[tuple[int, str]] = []
    at = 0.0
    for what, value in facts(rng):
        at += rng.expovariate(1 / every)
        distance = NEAREST * (FARTHEST / NEAREST) ** rng.random()
        if at > len(text):
            break
        if at + distance > len(text):
            continue  # it would never be asked for
        inserted.append((int(at), rng.choice(_NOTES).format(what=what, value=value)))
        recall = rng.choice(_RECALLS).format(what=what, value=value)
        inserted.append((int(at + distance), recall[0].upper() + recall[1:]))
    breaks = [match.end() for match in re.finditer(r"\n[ \t\r]*\n\s*", text)]
    parts, done, number = [], 0, 0
    for at, sentence in sorted(inserted):
        while number < len(breaks) and breaks[number] < at:
            number += 1
        if number == len(breaks):
            break  # what would come now is behind the last paragraph
        parts += [text[done : breaks[number]], sentence, "\n\n"]
        done = breaks[number]
    return "".join([*parts, text[done:]])


def code_documents(folder: Path, rng: random.Random) -> Iterator[str]:
    """Python files below a folder, those of one directory in one document, which is what refers to itself; any order.

    Raises:
        DataError: there are none.
    """
    directories: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(folder).parts):
            directories.setdefault(path.parent, []).append(path)
    if not directories:
        raise DataError(f"{folder}: holds no Python files; name a folder of code.")
    # Many files of one directory (the standard library's own) are many documents of some files each.
    batches = [files[at : at + 8] for files in directories.values() for at in range(0, len(files), 8)]
    rng.shuffle(batches)
    for files in batches:
        texts = [(path, path.read_text(encoding="utf-8", errors="replace")) for path in files]
        yield "\n\n".join(f"# {path.relative_to(folder)}\n\n{text}" for path, text in texts if text.strip())


def write_mixture(texts: Path, output: Path, mixture: Mixture, code: Path | None = None) -> dict[str, int]:
    """Write the mixture into a folder that `data.path` can name.

    Args:
        texts: what `data.path` takes.
        code: folder of Python code; None: this Python's standard library.

    Returns:
        Characters of text, notes included, and of code.

    Raises:
        DataError: the text or the code cannot be read, or there is too little code.
    """
    written = {"text": 0, "code": 0}
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, document in enumerate(RecordReader(texts)):
        text = document.text
        if mixture.notes:
            text = with_notes(text, mixture.notes, random.Random(f"{mixture.seed}/{number}"))
        written["text"] += len(text)
        lines.append(text)
    replace_text(output / TEXT_FILE, _lines(lines))
    wanted = written["text"] * mixture.code / (1 - mixture.code)
    lines = []
    if wanted:
        folder = code or Path(sysconfig.get_path("stdlib"))
        for text in code_documents(folder, random.Random(mixture.seed)):
            text = text[: int(wanted) - written["code"]]
            lines.append(text)
            written["code"] += len(text)
            if written["code"] >= int(wanted):
                break
        else:
            raise DataError(
                f"{folder}: holds {written['code']:,} characters of code and a share of {mixture.code:g} is "
                f"{int(wanted):,}; name a folder of more code, or lower the share."
            )
        replace_text(output / CODE_FILE, _lines(lines))
    else:  # an earlier mixture's would be trained on
        (output / CODE_FILE).unlink(missing_ok=True)
    return written


def _lines(texts: Sequence[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
