"""Files are known by their content; what is not read is named, and data of unread kinds is refused."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from parallel.errors import DataError
from pipeline.data.discovery import find_texts, matched, matches_of
from pipeline.data.kinds import LINES, LIST, TEXT
from pipeline.data.records import RecordReader
from tests.support.data_helpers import write_shards
from tools.prepare_data import main as prepare_main

RECORDS = b'{"text": "one"}\n{"text": "two"}\n'
PACK: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bz2.compress,
}


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in RecordReader(path, field)]


def refused(path: Path, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        texts(path, field)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


def archive(kind: str) -> bytes:
    """Bytes of a data file, as the libraries that own the format write them."""
    out = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    elif kind == "zip":
        with zipfile.ZipFile(out, "w") as whole:
            whole.writestr("a.txt", "text")
    elif kind == "npy":
        np.save(out, np.arange(9))
    elif kind == "sqlite":
        return sqlite3.connect(":memory:").execute("create table t (a)").connection.serialize()
    # Of these no library is installed; the magic numbers are those of the formats' specifications.
    known = {
        "idx": b"MMIDIDX\0\0" + bytes(64),
        "bin": bytes(range(256)),
    }
    return out.getvalue() or known[kind]


@pytest.mark.parametrize("kind", ["idx", "bin", "tar", "zip", "npy", "sqlite"])
def test_data_of_unread_kinds_is_refused_wherever_it_is_named(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "LICENSE.txt").write_text("Permission is hereby granted.")
    data = archive(kind)
    named = [f"train.{kind}"]
    if kind != "bin":  # told by its content under other names, and packed
        named += ["train", "train.jsonl", "train.txt", "train.json", "train.txt.gz"]
    for name in named:
        file = tmp_path / name
        file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        said = refused(tmp_path)
        assert said.startswith(f"{file}: ") and "which is not read" in said and "or move it away" in said, said
        mends = ("unpack it", "convert it to .jsonl or .txt", "prepare it alone, with longspan prepare")
        assert any(mend in said for mend in mends)
        assert refused(file).startswith(f"{file}: ")
        arguments = ["--input", tmp_path, "--output", tmp_path.with_name("out"), "--tokenizer", tmp_path]
        assert prepare_main([str(argument) for argument in arguments]) == 2
        capsys.readouterr()
        file.unlink()
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.{kind}").write_bytes(data)
    assert refused(tmp_path).startswith(f"{tmp_path}/a.{kind}: ") and "(as 2 other files there)" in refused(tmp_path)


def test_every_file_that_is_not_read_is_named_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert find_texts(tmp_path).warnings == ()
    write_shards(tmp_path / "prepared", [[5, 6]])
    for name in ("README.md", "LICENSE", "sub/picture.png", ".hidden", ".git/x.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n\0" if "png" in name else b"words")
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"features": {"text": 1}}, indent=1))
    (tmp_path / "state.json").write_text(json.dumps({"rows": 3}))
    os.mkfifo(tmp_path / "pipe")
    found = find_texts(tmp_path)
    names = "LICENSE, README.md, dataset_infos.json, pipe, prepared, state.json, sub/picture.png"
    assert found.warnings == (f"{tmp_path}: 7 files are not read: {names}.",)
    assert [file.path.name for file in found.files] == ["a.txt"]
    for number in range(5):
        (tmp_path / f"z{number}.rst").touch()
    assert find_texts(tmp_path).warnings[0].endswith("sub/picture.png, z0.rst and 4 more.")
    (tmp_path / "a.txt").unlink()
    assert "holds no file ending in .txt" in refused(tmp_path) and "(there are LICENSE, README.md" in refused(tmp_path)


def test_splits_of_the_hub_that_lie_together_are_told(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        (tmp_path / f"{name}.jsonl").write_bytes(RECORDS)
    assert find_texts(tmp_path).warnings == () and len(texts(tmp_path)) == 4
    (tmp_path / "test-00000-of-00001.jsonl").write_bytes(RECORDS)
    (told,) = find_texts(tmp_path).warnings
    assert told.startswith(
        f"{tmp_path}: holds the splits test, train of a data set (by the names of its files), and all"
    )


def test_a_folder_of_prepared_folders_alone_names_one(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_shards(tmp_path / "chats" / name, [[1, 2, 3]])
    with pytest.raises(
        DataError, match=r"holds prepared folders \(train, validation\) and no text; name one of them: "
    ) as told:
        find_texts(tmp_path / "chats")
    assert f"{tmp_path / 'chats' / 'train'}." in str(told.value)


def test_markdown_is_text_but_for_what_describes_a_folder(tmp_path: Path) -> None:
    for name in ("a.md", "sub/b.markdown", "sub/Readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"# packed"))
    assert texts(tmp_path) == ["# a.md", "# packed", "# sub/b.markdown"]
    assert find_texts(tmp_path).warnings == (f"{tmp_path}: 1 file is not read: sub/Readme.md.",)
    assert texts(tmp_path / "sub/Readme.md") == ["# sub/Readme.md"], "where it is named itself"
    (tmp_path / "CHANGELOG.md").write_text("no data")
    assert len(texts(tmp_path)) == 3
    # Beside other text it is notes, as in earlier releases.
    (tmp_path / "book.txt").write_text("a book")
    assert texts(tmp_path) == ["a book"]
    assert "5 files are not read: CHANGELOG.md, a.md, c.md.gz, sub/Readme.md" in find_texts(tmp_path).warnings[0]


@pytest.mark.parametrize("packing", PACK)
def test_packing_is_known_by_its_first_bytes(tmp_path: Path, packing: str) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.JSONL.XZ", "a.zst.jsonl", "a.json", "a.ndjson"):
        (tmp_path / name).write_bytes(PACK[packing](RECORDS))
        (found,) = find_texts(tmp_path / name).files
        assert (found.kind, found.packing) == (LINES, packing) and texts(tmp_path / name) == ["one", "two"]
    (tmp_path / "plain.txt.gz").write_text("unpacked by the browser")
    assert texts(tmp_path / "plain.txt.gz") == ["unpacked by the browser"]
    (tmp_path / "e.txt").write_bytes(PACK[packing](b"\xef\xbb\xbfwords"))
    assert texts(tmp_path / "e.txt") == ["words"]
    for cut in (0, 1, 2):
        (tmp_path / f"c.txt.{packing}").write_bytes(PACK[packing](b"words")[:cut])
        assert "the archive is truncated or corrupt" in refused(tmp_path / f"c.txt.{packing}")


def test_json_lines_are_known_by_their_records(tmp_path: Path) -> None:
    def kind(name: str, data: bytes, field: str = "text") -> str:
        (tmp_path / name).write_bytes(data)
        (found,) = find_texts(tmp_path / name, field).files
        return found.kind

    assert kind("a.json", RECORDS) == kind("a.txt", RECORDS) == kind("b.txt", b"\xef\xbb\xbf" + RECORDS) == LINES
    assert texts(tmp_path / "a.json") == texts(tmp_path / "a.txt") == texts(tmp_path / "b.txt") == ["one", "two"]
    assert kind("one.json", b'{"text": "the only one"}') == LINES
    long = json.dumps({"text": "x" * 300_000}).encode()
    assert kind("long.json", long + b"\n" + long) == kind("long.txt", long) == LINES
    # Of another field: records in a .json are told of at once, in a .txt they are text.
    assert kind("c.json", b'{"body": "one"}\n{"body": "two"}') == LINES
    assert "has no field 'text' (it has body)" in refused(tmp_path / "c.json")
    assert kind("d.txt", b'{"body": "one"}') == TEXT and kind("d.txt", b'{"body": "one"}', "body") == LINES
    for prose in (b"{ an aside }\nand on", b'{"text": "a motto"}\nThen prose.', b"[Illustration]\n", b"", b"{"):
        assert kind("e.txt", prose) == TEXT
    for name in ("f.jsonl", "f.json", "f.jsonl.gz"):
        data = json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if "gz" in name else data)
        (found,) = find_texts(tmp_path / name).files
        assert found.kind == LIST and texts(tmp_path / name) == ["one", "two"]
        assert "f.jsonl: record 1 has no field 'body' (it has text)" in refused(tmp_path / "f.jsonl", "body")
    for other in (b"[1, 2]", b'["a"]', b"[[{}]]"):
        (tmp_path / "f.json").write_bytes(other)
        assert "f.json: holds a JSON list of something else than objects; convert it" in refused(tmp_path / "f.json")
    for whole in (b'{"a": 1}', b'{\n "text": "pretty"\n}'):
        (tmp_path / "g.json").write_bytes(whole)
        told = 'g.json: holds neither a list of objects nor one {"text": ...} a line; write it as either'
        assert told in refused(tmp_path / "g.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_and_binaries(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes('{"text": "Wörter"}'.encode(encoding))
    said = refused(tmp_path)
    marked = encoding in ("utf-16", "utf-32")
    assert said.startswith(str(tmp_path / name))
    assert (f"{encoding.upper()} text, not UTF-8; convert it" if marked else "no text (it has NUL bytes)") in said
    (tmp_path / name).write_bytes(b"\x7fELF\2\1\1\0" + bytes(99))
    assert "is no text (it has NUL bytes)" in refused(tmp_path)


def test_a_pdf_is_no_text(tmp_path: Path) -> None:
    # Some hold no byte that is not ASCII, and would be trained on as they are.
    for name in ("a.pdf", "a.txt"):
        (tmp_path / name).write_bytes(b"%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\n")
        assert f"{name}: is a PDF, whatever its name; convert it to text" in refused(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"one")
    assert texts(tmp_path) == ["one"]  # a PDF beside text is named as every file that is not read


def test_a_pattern_matches_what_glob_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that are not hidden, the ones that Python's own `glob` finds; each once, in the order of their paths."""
    monkeypatch.chdir(tmp_path)
    names = [
        "a.txt",
        "b.txt",
        "B1.txt",
        "c.md",
        "s/a.txt",
        "s/t/a.txt",
        "s/t/b.jsonl",
        ".h/a.txt",
        "s/.h.txt",
        "s/t/x[1].txt",
    ]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    patterns = [
        "*.txt",
        "?.txt",
        "[ab].txt",
        "[!a].txt",
        "*",
        "*/*.txt",
        "**/*.txt",
        "**",
        "s/**",
        "s/**/a.*",
        "**/t/*",
    ]
    for pattern in [*patterns, "**/x[[]1].txt", "./s/*.txt", "*/**/b*"]:
        expected = {path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()}
        found = matched(Path(pattern))
        assert found == sorted(map(Path, expected), key=lambda path: path.parts), pattern
    assert matched(Path("s/t/x[1].txt")) is None, "a file of this very name"
    assert texts(Path("s/t/x[1].txt")) == ["text"]
    os.symlink(tmp_path, "s/up")
    os.symlink(tmp_path / "s", "s/t/round")
    assert len(matched(Path("**/*.txt")) or ()) == 6, "links that lead in circles are followed once"


def test_a_pattern_is_read_as_a_folder_is(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, data in (("a.txt", b"one"), ("b.jsonl", RECORDS), ("c.csv", b"text\nthree\n"), ("notes.pdf", b"%PDF")):
        (tmp_path / "d" / name).write_bytes(data)
    assert texts(tmp_path / "d/*") == texts(tmp_path / "d") == ["one", "one", "two", "three"]
    assert texts(tmp_path / "*/[ab].*") == ["one", "one", "two"]
    found = find_texts(tmp_path / "d/*")
    assert found.warnings == (f"{tmp_path}/d: 1 file is not read: notes.pdf.",)
    assert matches_of(tmp_path / "d/*.*s*") == f"{tmp_path}/d/*.*s* matches 2 files: b.jsonl, c.csv."
    assert matches_of(tmp_path / "d") == ""
    for pattern, words in (
        ("d/*.tx", "matches no file; mend the pattern"),
        ("none/*", f"matches no file, as there is no folder {tmp_path}/none; mend"),
        ("*.txt", "matches no file; mend the pattern"),
    ):
        assert refused(tmp_path / pattern).startswith(f"{tmp_path}/{pattern}: {words}")
    (tmp_path / "d/z.zip").write_bytes(archive("zip"))
    assert "z.zip: is a zip archive" in refused(tmp_path / "d/*")
    assert texts(tmp_path / "d/*.csv") == ["three"]
    write_shards(tmp_path / "p/q", [[1]])
    assert f"but {tmp_path}/p/q, a folder of prepared tokens; name it alone" in refused(tmp_path / "p/*")


def test_what_would_be_waited_for_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert "a.txt: is a pipe or a device, not a file" in refused(tmp_path)


def test_splits_by_any_of_their_names_are_told(tmp_path: Path) -> None:
    for name in ("train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl", "train-x-00000-of-00001.jsonl"):
        (tmp_path / name).write_bytes(RECORDS)
    (warning,) = find_texts(tmp_path).warnings
    assert "the splits test_sft, train_sft of a data set" in warning
    assert f"e.g. '{tmp_path}/train_sft-*.jsonl'" in warning
    assert not find_texts(tmp_path / "train*").warnings
