"""A file that is named is known by its content, whatever its name; messages name what is read, and nothing else."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from pathlib import Path

import pytest
import zstandard

from parallel.errors import DataError
from pipeline.data.chat_records import conversation_files, passed_over, read_records
from pipeline.data.discovery import find_texts
from pipeline.data.kinds import LINES, LIST, TEXT
from pipeline.data.prepare import left_out
from pipeline.data.records import RecordReader

PROSE = "Call me Ishmael.\nSome years ago — never mind.\n"
ROWS = [{"text": "one"}, {"text": "two"}]
CONTENTS = {
    "prose": (PROSE, TEXT, [PROSE]),
    "lines": ("".join(json.dumps(row) + "\n" for row in ROWS), LINES, ["one", "two"]),
    "list": (json.dumps(ROWS, indent=1), LIST, ["one", "two"]),
    "a bracket": ("[Illustration]\n[{ not JSON", TEXT, ["[Illustration]\n[{ not JSON"]),
}
PACK = {"": bytes, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}


def read(path: Path) -> list[str]:
    return [document.text for document in RecordReader(path)]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["c1.dat", "c1", "c1.v2.text", "c1.txt", "c1.log.gz", "c1.bin"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_named_file_is_known_by_its_content(content: str, name: str, packing: str, tmp_path: Path) -> None:
    text, kind, documents = CONTENTS[content]
    file = tmp_path / name
    file.write_bytes(PACK[packing](text.encode()))
    (found,) = find_texts(file).files
    assert (found.kind, found.packing) == (kind, packing)
    assert read(file) == documents


def test_a_long_first_object_of_a_list_is_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "books.txt"
    file.write_text(json.dumps([{"id": 1, "text": "é" * 300_000}, {"id": 2, "text": "two"}], ensure_ascii=False))
    assert [len(text) for text in read(file)] == [300_000, 3]


def test_a_folder_takes_files_by_their_endings_and_tells_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name in ("c1.dat", "c2"):
        (tmp_path / name).write_text(PROSE)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    assert find_texts(tmp_path).warnings == (f"{tmp_path}: 2 files are not read: c1.dat, c2.",)
    assert conversation_files(tmp_path) == [tmp_path / "rows.jsonl"]
    assert passed_over(tmp_path) == (f"{tmp_path}: 3 files are not read: a.txt, c1.dat, c2.",)
    assert passed_over(tmp_path / "rows.jsonl") == ()


def test_named_conversations_are_known_by_their_content(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    for name, text in (("x.dat", json.dumps(rows)), ("x", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert [record.value for record in read_records(tmp_path / name)] == rows
        # As text they are refused, whatever their name.
        for other in (name, "y.txt"):
            (tmp_path / other).write_text(text)
            with pytest.raises(DataError, match=r"holds conversations; prepare them with longspan prepare --chat"):
                find_texts(tmp_path / other)


@pytest.mark.parametrize("separator", ",\t;|")
@pytest.mark.parametrize("size", [1, 400])
def test_csv_of_another_name_is_told(separator: str, size: int, tmp_path: Path) -> None:
    file, out = tmp_path / "table.txt", io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([["id", "text"], *([n, f'He said "no",{separator}\nand left.'] for n in range(size))])
    file.write_text(out.getvalue())
    (found,) = find_texts(file).files
    told = f"{file}: begins as CSV with a column 'text' and is read as one document; rename it to .csv if its rows are "
    assert found.kind == TEXT and left_out(file, "text") == (told + "the documents.",)
    assert find_texts(tmp_path).warnings == (told + "the documents.",), "in a folder, too"
    assert not find_texts(file, "body").warnings, "of another column"
    assert len(read(file.rename(file.with_suffix(".csv")))) == size


@pytest.mark.parametrize(
    "prose",
    ["The text, and\nits note, too\n", "text\na\nb\n", "id,text\n", "id,text\na,b,c\n", 'text, and "so\non, so'],
)
def test_prose_is_no_csv(prose: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose)
    assert find_texts(tmp_path / "a.txt").warnings == ()


def test_binary_files_are_refused_whatever_their_name(tmp_path: Path) -> None:
    for name in ("a", "a.dat", "a.bin", "a.md"):
        (tmp_path / name).write_bytes(b"\x01\x00\x02\x00" * 100)
        with pytest.raises(DataError, match=rf"{re.escape(name)}: is "):
            find_texts(tmp_path / name)
    (tmp_path / "b").write_text(PROSE, encoding="utf-16")
    with pytest.raises(DataError, match=r"b: is UTF-16 text, not UTF-8; convert it"):
        find_texts(tmp_path / "b")


def test_messages_name_every_ending_that_is_read_and_no_other(tmp_path: Path) -> None:
    """Each that they name is read in a folder."""
    for find, empty in ((find_texts, "holds no file ending in "), (conversation_files, "no file ending in ")):
        (tmp_path / "none").mkdir(exist_ok=True)
        with pytest.raises(DataError) as refused:
            find(tmp_path / "none")
        words = str(refused.value).partition(empty)[2]
        plain, packed, tables = re.fullmatch(
            r"(.*) \(each also packed: (.*)\), (\.parquet, \.pq, \.arrow, \.feather)[;)].*", words
        ).groups()  # type: ignore[union-attr]
        assert tables and packed == ".xz, .gz, .zst, .bz2"
        for ending in plain.split(", "):
            for packing in ("", *packed.split(", ")):
                folder = tmp_path / f"{find.__name__}{ending}{packing}"
                folder.mkdir()
                row = "text,instruction\na,b\n" if ending in (".csv", ".tsv") else '{"text": "a", "instruction": "b"}\n'
                (folder / f"a{ending}{packing}").write_bytes(PACK[packing.removeprefix(".")](row.encode()))
                find(folder)
        assert {".json", ".jsonl", ".ndjson", ".jsonlines", ".csv", ".tsv"} <= set(plain.split(", "))
        assert (".md" in plain) == (find is find_texts)
