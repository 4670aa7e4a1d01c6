"""One document of many megabytes: its tokens, the memory it takes, and the progress shown meanwhile."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from parallel.errors import DataError
from pipeline.data import prepare as prepare_module
from pipeline.data.prepare import prepare
from pipeline.data.records import RecordReader
from pipeline.data.shards import open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.unit.data.test_cuts import CORPUS, SHAPES, write_pieces

ROOT = Path(__file__).parents[2]
CHUNK = 1 << 18  # bytes of text read at once

MEASURED = """
import resource, sys
from pathlib import Path
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import load_tokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

source, out, model = map(Path, sys.argv[1:])
tokenizer = load_tokenizer(model)
done = []
before = peak()
prepare(source, out, tokenizer, progress=lambda *told: done.append(told[0]))
print((peak() - before) << 10, len(set(done)))
"""


def test_memory_and_progress_do_not_depend_on_the_length(tmp_path: Path) -> None:
    whole = SHAPES["llama-3"]()
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    book = "".join(CORPUS[:1500])
    text = book * (6_000_000 // len(book.encode()))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "a.txt.gz"), str(tmp_path / "out"), str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    size = len(text.encode())
    assert int(told[0]) < 160 << 20, f"{int(told[0]) / size:.0f} bytes a byte"  # at once it would be 800 MiB
    assert int(told[1]) > 4
    shards = open_shards(tmp_path / "out", load_tokenizer(tmp_path))
    sample = book * 2
    whole.encode_special_tokens = True
    ids = whole.encode(sample, add_special_tokens=False).ids
    assert shards.read(0, len(ids) - 9).tolist() == ids[:-9]
    assert shards.manifest.documents == 1


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pieces(tmp_path_factory.mktemp("pieces"), normalization_rule_name="identity")


@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl"])
def test_long_and_short_documents_with_any_number_of_workers(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 1000)
    long = "".join(CORPUS[:1200]) * (900_000 // len("".join(CORPUS[:1200])))
    texts = [long, "short one", "  \n", long[:600_000], "last"]
    folder = tmp_path / "text"
    folder.mkdir()
    if kind == "a.jsonl":
        (folder / kind).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text)
    tokenizer = load_tokenizer(pieces)
    one = prepare(folder, tmp_path / "one", tokenizer)
    two = prepare(folder, tmp_path / "two", tokenizer, workers=2)
    assert one == two and (one.documents, one.skipped) == (4, 1)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    wanted = [[*processor.encode(text), tokenizer.eos_id] for text in texts if text.strip()]
    shards = open_shards(tmp_path / "two", tokenizer, verify=True)
    assert shards.read(0, len(shards)).tolist() == [number for ids in wanted for number in ids]
    assert shards.starts.tolist() == [sum(map(len, wanted[:number])) for number in range(4)]


def test_text_that_may_not_be_cut_says_what_memory_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_module, "_LARGE", 300_000)
    tokenizer = load_tokenizer(write_pieces(tmp_path, model_type="unigram"))
    text = "".join(CORPUS[:1000]) * 8
    (tmp_path / "a.txt").write_text(text)
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer)
    told = capsys.readouterr().err
    assert f"warning: {tmp_path / 'a.txt'}: {len(text):,} characters of one document are tokenized at once" in told
    shards = open_shards(tmp_path / "out")
    assert shards.read(0, len(shards) - 1).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("shift", range(4))
def test_characters_across_the_pieces_that_are_read(tmp_path: Path, shift: int) -> None:
    text = "x" * (CHUNK - shift) + "😀é" * 5 + "y" * CHUNK + "😀"
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(mark + text.encode())
        reader = RecordReader(tmp_path)
        assert [document.text for document in reader] == [text]
        assert len(list(RecordReader(tmp_path).pieces())) > 2
        assert (reader.documents, reader.empty, reader.done_bytes) == (1, 0, reader.total_bytes)


@pytest.mark.parametrize(("tail", "place"), [(b"\xff", 0), (b"\xf0\x9f\x98", 0), (b"ab\xf0\x9f", 2), (b"\xc3(", 0)])
@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 5])
def test_the_place_of_what_is_not_utf8(tmp_path: Path, tail: bytes, place: int, length: int) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(mark + b"x" * length + tail)
        with pytest.raises(DataError, match=f"a.txt: byte {len(mark) + length + place} of the text is not UTF-8"):
            list(RecordReader(tmp_path))


def test_white_space_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    blank = " " * (2 * CHUNK)
    for name, text in {"a.txt": blank, "b.txt": blank + "word", "c.txt": ""}.items():
        (tmp_path / name).write_text(text)
    reader = RecordReader(tmp_path)
    found = [document.text for document in reader]
    assert (found, reader.documents, reader.empty) == ([blank + "word"], 1, 2)
