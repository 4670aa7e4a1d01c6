"""Text mixed with code and notes: nothing of it is lost, every question has its answer above it, shares are right."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from pipeline.data.records import RecordReader
from tools.mix_text import main
from tools.support.mixture import NEAREST, Mixture, with_notes

NOTE = re.compile(r"(?:Note: |Bear in mind that |By the way, )(the .+) is (\w+)\.\n\n")
RECALL = re.compile(
    r"(?:As was noted, (the .+) is (\w+)\.|Question: what is (the .+)\? Answer: (\w+)"
    r"|Q: Do you remember (the .+)\?\n\nA: Yes, it is (\w+)\.|To come back to it: (the .+) is (\w+)\.)\n\n"
)


@pytest.fixture(scope="module")
def book() -> str:
    rng = random.Random(1)
    words = [rng.choice(["red", "sea", "ship", "and"]) for _ in range(40_000)]
    return "\n\n".join(" ".join(words[at : at + 40]) for at in range(0, len(words), 40))


def test_every_recall_follows_its_note(book: str) -> None:
    mixed = with_notes(book, 1000, random.Random(3))
    found = sorted(
        [(m.start(), "note", *m.groups()) for m in NOTE.finditer(mixed)]
        + [(m.start(), "recall", *(g for g in m.groups() if g is not None)) for m in RECALL.finditer(mixed)]
    )
    told: dict[str, tuple[int, str]] = {}
    distances = []
    for at, kind, what, value in found:
        if kind == "note":
            told[what] = (at, value)
        else:
            begin, expected = told.pop(what)
            assert value == expected, f"{what} at {at}"
            distances.append(at - begin)
    # Few notes lie too near the end to be asked for, and those are left out; all others are asked for once.
    assert len(distances) > 80 and not told
    assert min(distances) >= NEAREST / 2 and max(distances) > 30_000, "near and far; a paragraph more or less"
    assert RECALL.sub("", NOTE.sub("", mixed)) == book, "and the book is all there"


def test_a_mixture_has_its_share_of_code_and_is_text(book: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(book)
    arguments = ["--input", str(tmp_path / "books"), "--notes", "0"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--code", "0.25"]) == 0
    text, code = (
        [json.loads(line)["text"] for line in (tmp_path / "out" / f"{name}.jsonl").open()] for name in ("text", "code")
    )
    assert text == [book]
    share = sum(map(len, code)) / (len(book) + sum(map(len, code)))
    assert share == pytest.approx(0.25, abs=1e-3)
    assert any("def " in part for part in code) and all(part.startswith("# ") for part in code)
    assert [d.text for d in RecordReader(tmp_path / "out")] == [*code, *text], "what data.path reads"
    assert main([*arguments, "--output", str(tmp_path / "out"), "--code", "0"]) == 0
    assert [d.text for d in RecordReader(tmp_path / "out")] == [book], "the code of before is gone"
    capsys.readouterr()

    few = tmp_path / "few"
    few.mkdir()
    (few / "a.py").write_text("x = 1\n")
    for more, told in (
        (["--code-folder", str(few)], "holds 14 characters of code and a share of 0.2 is"),
        (["--code-folder", str(tmp_path / "books")], "holds no Python files"),
        (["--code", "1"], "code: 1.0 is no share in [0, 1)"),
        (["--notes", "3"], "one every 3 characters leaves no text"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "other"), *more]) == 2
        assert told in capsys.readouterr().err


def test_the_same_seed_gives_the_same_text(book: str) -> None:
    same = {with_notes(book, 2000, random.Random(seed)) for seed in (1, 1, 2)}
    assert len(same) == 2
    assert Mixture(0.2, 6000) == Mixture(0.2, 6000, 0)
