"""Text files of every kind, plain and packed, and one sentence naming file, line or byte for every bad one."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from parallel.errors import DataError
from pipeline.data.discovery import find_texts
from pipeline.data.records import Document, RecordReader

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
}
PACKED = [ending for ending in PACK if ending]
TEXTS = ["Call me Ishmael.", "zwei\nZeilen é 😀\r\n", "\u2028 three \x0b\x0c \x85 end"]
LINES = b"".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False).encode() + b"\n" for text in TEXTS)
NOISE = random.Random(0).randbytes  # incompressible, so that cutting an archive cuts its data


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in RecordReader(path, field)]


@pytest.mark.parametrize("packing", PACK)
def test_txt_is_one_document_byte_for_byte(tmp_path: Path, packing: str) -> None:
    file = tmp_path / f"a.txt{packing}"
    file.write_bytes(PACK[packing]("\r\n".join(TEXTS).encode()))
    assert list(RecordReader(file)) == [Document("\r\n".join(TEXTS), file, None)]


@pytest.mark.parametrize("packing", PACK)
def test_jsonl_is_one_document_a_line(tmp_path: Path, packing: str) -> None:
    file = tmp_path / f"A.JSONL{packing.upper()}"
    file.write_bytes(PACK[packing](b"\n" + LINES + b'  \n{"text": " \\n"}\n' + LINES.rstrip(b"\n")))
    reader = RecordReader(file)
    found = list(reader)
    assert [document.text for document in found] == TEXTS * 2
    assert [document.line for document in found] == [2, 3, 4, 7, 8, 9]
    assert (reader.documents, reader.empty) == (6, 1)
    assert reader.done_bytes == reader.total_bytes == file.stat().st_size


@pytest.mark.parametrize("packing", PACKED)
def test_archive_of_several_parts_and_more_than_a_buffer(tmp_path: Path, packing: str) -> None:
    parts = [NOISE(300_000).hex(), "b" * 700_000, "", NOISE(1000).hex()]
    file = tmp_path / f"a.txt{packing}"
    file.write_bytes(b"".join(PACK[packing](part.encode()) for part in parts))
    assert texts(file) == ["".join(parts)]


def test_xz_padding_between_streams_and_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.xz"
    padding = bytes(400_000)  # longer than a buffer
    file.write_bytes(lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two") + padding)
    assert texts(file) == ["one two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz"])
def test_byte_order_mark_is_not_text(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + (b'{"text": "x"}\n' if "jsonl" in name else b"x")
    (tmp_path / name).write_bytes(PACK[".gz" if name.endswith("gz") else ""](data))
    assert texts(tmp_path / name) == ["x"]


def test_folder_order_hidden_files_and_empty_documents(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", "B.txt", "a-b/x.txt", ".hidden.txt", ".git/x.txt", "x.rst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt").write_text(" \n\t")
    (tmp_path / "d.txt").write_text("")
    reader = RecordReader(tmp_path)
    assert [document.text for document in reader] == ["B.txt", "a/b/c.txt", "a/z.txt", "a-b/x.txt", "a.txt", "b.txt"]
    assert (reader.documents, reader.empty) == (6, 2)


def test_progress_never_falls_and_ends_at_the_total(tmp_path: Path) -> None:
    for number, packing in enumerate(PACK):
        (tmp_path / f"{number}.jsonl{packing}").write_bytes(PACK[packing](LINES * 500))
    reader = RecordReader(tmp_path)
    seen = [reader.done_bytes for _ in reader]
    assert seen == sorted(seen) and len(seen) == len(PACK) * 500 * len(TEXTS)
    assert 0 < seen[0] <= seen[-1] <= reader.done_bytes == reader.total_bytes


def test_links_are_followed_once(tmp_path: Path) -> None:
    real = tmp_path / "corpus" / "real"
    real.mkdir(parents=True)
    (real / "x.txt").write_text("x")
    (real.parent / "again").symlink_to(real)
    (real / "loop").symlink_to(real.parent)
    found = [file.path.relative_to(real.parent).as_posix() for file in find_texts(real.parent).files]
    assert found == ["again/x.txt"]
    (real.parent / "gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone.txt: cannot be read \(No such file or directory\); mend or remove it"):
        RecordReader(real.parent)


@pytest.mark.parametrize("packing", PACK)
def test_bad_utf8_names_the_byte(tmp_path: Path, packing: str) -> None:
    text, lines = tmp_path / f"t.txt{packing}", tmp_path / f"l.jsonl{packing}"
    text.write_bytes(PACK[packing](b"\xef\xbb\xbfab\xffcd"))
    lines.write_bytes(PACK[packing](b'{"text": "a"}\n\n{"text": "\xe9"}\n'))
    with pytest.raises(DataError, match=rf"t.txt{packing}: byte 5 of the text is not UTF-8; convert"):
        texts(text)
    with pytest.raises(DataError, match=rf"l.jsonl{packing}: byte 25 of the text is not UTF-8"):
        texts(lines)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "is not JSON"),
        ("{'text': 'a'}", "is not JSON"),
        ('{"text": "a"} {"text": "b"}', "is not JSON .Extra data"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "is not JSON"),
        ('["a"]', 'is not a JSON object; write one {"text": ...} a line'),
        ('{"b": "x", "a": "y"}', "has no field 'text' .it has a, b.; set the text field"),
        ("{}", "has no field 'text' .it has nothing."),
        ('{"text": ["a"]}', "holds list in field 'text'"),
        ('{"text": "ab\\ud800"}', "escapes half a surrogate pair at character 2"),
    ],
)
def test_bad_record_names_the_line(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    reader = iter(RecordReader(file))
    assert next(reader).text == "fine"
    with pytest.raises(DataError, match=f"a.jsonl: line 3 {words}") as caught:
        next(reader)
    assert "\n" not in str(caught.value)


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1, "content": "yes"}')
    assert texts(tmp_path / "a.jsonl", "content") == ["yes"]
    with pytest.raises(DataError, match="holds int in field 'text'"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_damaged_archives(tmp_path: Path, packing: str, kind: str) -> None:
    part = PACK[packing](b'{"text": "' + NOISE(2000).hex().encode() + b'"}\n')
    cuts = [1, 4, len(part) // 2, len(part) - 9, len(part) - 1]
    # Some flips make garbage with line breaks in it. Not zstd, whose frames need carry no checksum.
    places = range(900, 1100, 5) if packing != ".zst" else ()
    damaged = {
        "empty": b"",
        **{f"flipped at {at}": part[:at] + bytes([part[at] ^ 0xFF]) + part[at + 1 :] for at in places},
        "without its first byte": part[1:],
        "junk behind": part + b"junk",
        **{f"cut at {cut}": part[:cut] for cut in cuts},
        **{f"second part cut at {cut}": part + part[:cut] for cut in cuts},
        "second part's header damaged": part + b"\xff" + part[1:],
    }
    for what, data in damaged.items():
        file = tmp_path / f"{what}.{kind}{packing}"
        file.write_bytes(data)
        with pytest.raises(DataError, match=rf"{what}.{kind}{packing}: the archive is truncated or corrupt \(.+\)"):
            texts(file)


def test_wrong_places(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    cases = {
        "nowhere": "nowhere: no such file or folder; point it at text",
        "a.pdf": r"a.pdf: is not one of \.txt, \.md, .*; convert it",
        ".": r"holds no file ending in \.txt, .* \(there are a.pdf\); add text or point somewhere else",
    }
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            RecordReader(tmp_path / name)


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    reader = RecordReader(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a.txt: cannot be read \(No such file"):
        list(reader)


def test_a_missing_value_is_an_empty_document_as_in_tables(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n{"text": "x"}\n')
    reader = RecordReader(file)
    assert [(document.text, document.line) for document in reader] == [("x", 2)] and reader.empty == 1
