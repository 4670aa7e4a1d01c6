"""Token shards: what is written is read back, and any damage is one sentence that names the file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import DataError
from pipeline.data import shards as shards_module
from pipeline.data.folders import remove_leftovers
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.shards import DOCUMENTS, MANIFEST, is_prepared, open_shards, read_manifest, token_dtype
from tests.support.data_helpers import BYTES, WIDE, ByteTokenizer, stream_of, write_shards

DOCUMENTS_OF = [[10, 11, 12], [], [13] * 9, [14, 15]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", DOCUMENTS_OF, limit=5)
    return tmp_path / "shards"


@given(
    documents=st.lists(st.lists(st.integers(0, 258), max_size=12), min_size=1, max_size=9),
    limit=st.integers(1, 30),
    batch=st.integers(1, 4),
    wide=st.booleans(),
    data=st.data(),
)
def test_round_trip(documents: list[list[int]], limit: int, batch: int, wide: bool, data: st.DataObject) -> None:
    if wide:
        documents = [[*ids, WIDE.vocab_size - 1] for ids in documents]
    tokens, owners = stream_of(documents)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "new", "shards")
        manifest = write_shards(out, documents, WIDE if wide else BYTES, limit, batch)
        shards = open_shards(out, WIDE if wide else BYTES, verify=True)
        sizes = [entry.size for entry in manifest.files[:-1]]
        assert manifest == shards.manifest == read_manifest(out)
        assert (len(shards), manifest.documents, len(sizes)) == (len(tokens), len(documents), -(-len(tokens) // limit))
        assert sum(sizes) == len(tokens) * (4 if wide else 2)
        assert shards.read(0, len(tokens)).tolist() == tokens
        assert shards.starts.tolist() == [owners.index(number) for number in range(len(documents))]
        start = data.draw(st.integers(0, len(tokens)))
        stop = data.draw(st.integers(start, len(tokens)))
        assert shards.read(start, stop).tolist() == tokens[start:stop]
        assert sorted(path.name for path in out.parent.iterdir()) == ["shards"]


@pytest.mark.parametrize(("vocab", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_narrowest_type_that_holds_the_vocabulary(tmp_path: Path, vocab: int, dtype: str) -> None:
    tokenizer = ByteTokenizer(vocab_size=vocab)
    assert write_shards(tmp_path / "s", [[vocab - 1]], tokenizer).dtype == dtype == token_dtype(vocab)
    raw = (tmp_path / "s" / "tokens-00000.bin").read_bytes()
    assert raw == np.array([vocab - 1, 2], "<u2" if dtype == "uint16" else "<u4").tobytes()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 19)])
def test_reading_outside_the_stream(folder: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="leave the stream of 18"):
        open_shards(folder).read(start, stop)


def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="byte-tokenizer: produced token 259, outside its vocabulary of 259"):
        write_shards(tmp_path / "shards", [[259]])
    assert not list(tmp_path.iterdir())


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "shards", BYTES) as writer:
        writer.add(np.array([5, 2], np.uint32), np.array([2]))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_older_folder_is_replaced_whole(folder: Path) -> None:
    write_shards(folder, [[20]])
    assert sorted(path.name for path in folder.iterdir()) == [DOCUMENTS, MANIFEST, "tokens-00000.bin"]
    assert open_shards(folder, verify=True).read(0, 2).tolist() == [20, 2]
    assert [path.name for path in folder.parent.iterdir()] == ["shards"]


def test_the_folder_is_readable_by_others(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o755


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(folder: Path) -> None:
    keep = [".shards.lock", ".shards.writing-", ".other.writing-abcd1234", ".shards.writing-a.writing-abcd1234"]
    for name in [*keep, ".shards.writing-abcd1234", ".shards.old-abcd_234"]:
        (folder.parent / name).mkdir()
    (folder.parent / ".shards.writing-abcd1234" / "tokens-00000.bin").write_bytes(b"half")
    remove_leftovers(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([*keep, "shards"])
    folder.rename(folder.parent / ".shards.old-abcd1234")  # killed before the new one came
    remove_leftovers(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([*keep, "shards"])
    open_shards(folder, verify=True)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00003.bin", DOCUMENTS])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "has .* bytes where its manifest says"),
        (lambda data: b"", "has 0 bytes where its manifest says"),
        (lambda data: data + b"\0", "has .* bytes where its manifest says"),
        (None, "is missing"),
    ],
)
def test_a_file_of_the_wrong_size(folder: Path, name: str, change: Callable[[bytes], bytes], words: str) -> None:
    file = folder / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=rf"{name}: {words}.*; prepare the text again with longspan prepare\.$"):
        open_shards(folder)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00003.bin", DOCUMENTS])
def test_every_flipped_byte_is_found_by_verify_and_never_crashes_without(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for place in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            with pytest.raises(DataError, match=f"{name}: is damaged"):
                open_shards(folder, verify=True)
            try:
                open_shards(folder).read(0, 18)
            except DataError as error:
                assert str(folder) in str(error)


def test_documents_of_another_kind_of_file(folder: Path) -> None:
    size = (folder / DOCUMENTS).stat().st_size
    for start in (b"PK\x03\x04", b"PK\x05\x06", b"\x80\x04", b"\x93NUMPY\x09\x00", b""):
        (folder / DOCUMENTS).write_bytes(start.ljust(size, b"\0"))
        with pytest.raises(DataError, match="documents.npy: is damaged"):
            open_shards(folder)


@pytest.mark.parametrize(
    "starts",
    [
        np.array([0, 4, 5], np.int64),  # one too few
        np.array([1, 4, 5, 15], np.int64),
        np.array([0, 5, 4, 15], np.int64),
        np.array([0, 4, 5, 18], np.int64),
        np.array([0, 4, 4, 15], np.int64),
        np.array([0.0, 4, 5, 15]),
        np.array([[0, 4], [5, 15]], np.int64),
    ],
)
def test_documents_that_do_not_fit_the_tokens(folder: Path, starts: np.ndarray) -> None:
    np.save(folder / DOCUMENTS, starts)
    edit(folder, lambda record: record["files"][-1].update(size=(folder / DOCUMENTS).stat().st_size))
    with pytest.raises(DataError, match=r"documents.npy: is damaged \(the documents do not fit the tokens\)"):
        open_shards(folder)


def test_a_token_outside_the_vocabulary_is_found_when_opened_or_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "tokens-00001.bin"
    file.write_bytes(b"\xff\xff" + file.read_bytes()[2:])
    with pytest.raises(DataError, match="shards: holds token 65535, outside the vocabulary of 259"):
        open_shards(folder)
    monkeypatch.setattr(shards_module, "SCAN_TOKENS", 0)
    large = open_shards(folder)
    assert large.read(0, 5).tolist() == [10, 11, 12, 2, 2]
    with pytest.raises(DataError, match="shards: holds token 65535"):
        large.read(4, 6)


def test_another_tokenizer_is_refused(folder: Path) -> None:
    other = ByteTokenizer(path=Path("my-model"), fingerprint="other")
    assert len(open_shards(folder, BYTES)) == 18
    with pytest.raises(DataError, match="made with another tokenizer than my-model; prepare .* and this tokenizer"):
        open_shards(folder, other)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    (folder / MANIFEST).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(format="other"), r"is damaged \(format is 'other'\)"),
        (lambda r: r.update(version=2), "is of version 2, this program reads 1"),
        (lambda r: r.pop("tokens"), "is damaged .*'tokens'"),
        (lambda r: r.update(colour="red"), "is damaged .*'colour'"),
        (lambda r: r.update(tokens="18"), "is damaged .tokens is '18'"),
        (lambda r: r.update(tokens=True), "is damaged .tokens is True"),
        (lambda r: r.update(tokens=-18), "is damaged .tokens is -18"),
        (lambda r: r.update(documents=4.0), "is damaged .documents is 4.0"),
        (lambda r: r.update(tokenizer=None), "is damaged .tokenizer is None"),
        (lambda r: r.update(dtype="uint32"), "is damaged .dtype 'uint32' does not suit vocab_size 259"),
        (lambda r: r.update(dtype="object"), "is damaged .dtype 'object'"),
        (lambda r: r.update(vocab_size=1 << 20), "is damaged .dtype 'uint16' does not suit vocab_size 1048576"),
        (lambda r: r.update(eos_id=259), "is damaged .eos_id 259 is outside vocab_size 259"),
        (lambda r: r.update(files=None), "is damaged"),
        (lambda r: r.update(files=[1]), "is damaged"),
        (lambda r: r.update(files={"a": 1}), "is damaged"),
        (lambda r: r.update(files=r["files"][:-1]), "is damaged .*documents.npy"),
        (lambda r: r.update(sources=[{"name": "a"}]), "is damaged"),
        (lambda r: r.update(sources=[{"name": "a", "size": "1", "mtime_ns": 1, "sha256": ""}]), "is damaged .size is"),
        (lambda r: r["files"][0].update(size="10"), "is damaged .size is '10'"),
        (lambda r: r["files"][0].update(name="../x.bin"), "is damaged .file name '../x.bin' leaves the folder"),
        (lambda r: r["files"][0].update(name="/etc/passwd"), "is damaged .file name '/etc/passwd' leaves"),
        (lambda r: r["files"][0].update(name=".."), r"is damaged .file name '\.\.' leaves"),
        (lambda r: r["files"][0].update(name=""), "is damaged .file name '' leaves"),
        (lambda r: r["files"][0].update(name=7), "is damaged .name is 7"),
    ],
)
def test_manifest_nonsense(folder: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    edit(folder, change)
    with pytest.raises(DataError, match=rf"manifest.json: {words}.*; prepare the text again") as caught:
        open_shards(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, '{"format": "longspan-tokens"}'])
def test_manifest_that_is_no_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="manifest.json: is damaged"):
        open_shards(folder)


def test_manifest_missing_or_not_text(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="manifest.json: is damaged"):
        open_shards(folder)
    (folder / MANIFEST).unlink()
    assert not is_prepared(folder)
    for place in (folder, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=rf"{place.name}: has no manifest.json, so it holds no prepared tokens"):
            open_shards(place)


def test_fewer_tokens_than_counted(folder: Path) -> None:
    edit(folder, lambda record: record["files"].pop(1))
    with pytest.raises(DataError, match="shards: its shards do not hold the 18 tokens its manifest counts"):
        open_shards(folder)


def test_content_hash_is_of_content(folder: Path, tmp_path: Path) -> None:
    same = write_shards(tmp_path / "same", DOCUMENTS_OF, limit=5).content_hash
    assert open_shards(folder).fingerprint == same
    others = [[[10, 11, 12], [], [13] * 9, [14, 16]], [[10, 11, 12], [], [13] * 9 + [2, 14, 15]]]
    hashes = {write_shards(tmp_path / "other", documents, limit=5).content_hash for documents in others}
    assert len({same, *hashes}) == 3
