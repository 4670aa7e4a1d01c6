"""Token ids of other programs: Megatron's, written by its own builder, and flat arrays; damage is one sentence."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from parallel.errors import DataError
from pipeline.data import token_files
from pipeline.data.card import read_card
from pipeline.data.shards import TokenShards, open_shards
from pipeline.data.token_files import FlatFile, MegatronFile, TokenFile, megatron_index, prepare_tokens
from pipeline.data.tokenizer import load_tokenizer
from tests.support.data_helpers import BYTES, ByteTokenizer
from tests.support.tiny_models import write_tokenizer
from tools import prepare_data

DOCUMENTS = [[[5, 6, 2]], [[7, 8, 9], [10, 2]], [[11] * 30 + [2]], [[12, 13], [14], [2]], [[15, 2]]]
"""Documents of sequences of ids; EOS is 2."""


def build(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.uint16) -> Path:
    """Megatron's pair, by its own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix.with_name(f"{prefix.name}.idx")


def prepared(source: TokenFile, out: Path, tokenizer: ByteTokenizer = BYTES) -> TokenShards:
    prepare_tokens(source, out, tokenizer, lambda *_: None)
    return open_shards(out, verify=True)


def documents_of(shards: TokenShards) -> list[list[int]]:
    edges = [*shards.starts.tolist(), len(shards)]
    return [shards.read(a, b).tolist() for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("batch", [1, 4, 1 << 22])
def test_documents_are_those_that_megatron_reads(
    tmp_path: Path, dtype: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_BATCH", batch)
    index = build(tmp_path / "corpus", DOCUMENTS, dtype)
    theirs = IndexedDataset(str(index.with_suffix("")))
    borders = theirs.document_indices.tolist()
    wanted = [
        [int(token) for number in range(a, b) for token in theirs[number]]
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    assert wanted == [[token for sequence in document for token in sequence] for document in DOCUMENTS]
    assert megatron_index(index) == megatron_index(index.with_suffix(".bin")) == index
    shards = prepared(MegatronFile(index), tmp_path / "out")
    assert documents_of(shards) == wanted
    assert shards.manifest.ends == (None, 2) and shards.manifest.text_field == "tokens: Megatron"
    before = (tmp_path / "out/manifest.json").stat().st_ino
    prepared(MegatronFile(index), tmp_path / "out")
    assert (tmp_path / "out/manifest.json").stat().st_ino == before, "reused"
    build(tmp_path / "corpus", DOCUMENTS[::-1], dtype)
    assert documents_of(prepared(MegatronFile(index), tmp_path / "out")) == wanted[::-1], "and made anew"


def test_sequences_may_lie_in_any_order(tmp_path: Path) -> None:
    ids = np.arange(10, 20, dtype="<u2")
    (tmp_path / "a.bin").write_bytes(ids.tobytes())
    lengths, places, firsts = [3, 4, 2], [14, 0, 10], [0, 2, 2, 3]  # 17 18 19, 10 11 12 13, 15 16
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 4)
    body = np.array(lengths, "<i4").tobytes() + np.array(places, "<i8").tobytes() + np.array(firsts, "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(head + body)
    shards = prepared(MegatronFile(tmp_path / "a.idx"), tmp_path / "out")
    assert documents_of(shards) == [[17, 18, 19, 10, 11, 12, 13], [15, 16]]
    card = read_card(tmp_path / "out")
    assert card is not None and card["left_out"] == {"it has no tokens": {"count": 1}}
    assert card["warnings"] == [f"no document begins with BOS or ends with EOS of {BYTES.path}."]
    assert shards.manifest.ends == (None, None)


def _field(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:20], "is a damaged Megatron index (it ends early)"),
        (lambda data: data[:-1], "bytes where its header says"),
        (lambda data: data + bytes(9), "is of a multimodal data set"),
        (_field(9, b"\2"), "is of version 2 of Megatron's index"),
        (_field(17, b"\7"), "holds no token ids (its dtype has the code 7)"),
        (_field(34, b"\xff\xff\xff\x0f"), "a sequence lies outside of corpus.bin"),
        (_field(34, b"\xff\xff\xff\xff"), "a sequence lies outside of corpus.bin"),
        (_field(34 + 4 * 9, b"\1"), "a sequence lies outside of corpus.bin"),
        (lambda data: data[:-8] + b"\7" + data[-7:], "its documents do not hold its sequences"),
    ],
)
def test_a_damaged_index(tmp_path: Path, change: Callable[[bytes], bytes], said: str) -> None:
    index = build(tmp_path / "corpus", [*DOCUMENTS, [[3]]])
    data = index.read_bytes()
    assert struct.unpack_from("<QQ", data, 18) == (9, 7)
    index.write_bytes(change(data))
    with pytest.raises(DataError) as caught:
        MegatronFile(index)
    assert str(caught.value).startswith(f"{index}: ") and said in str(caught.value)


def test_a_missing_half_and_foreign_ids(tmp_path: Path) -> None:
    index = build(tmp_path / "corpus", [[[5, 300, 2]]])
    with pytest.raises(DataError, match=r"corpus.bin: holds token 300, outside the vocabulary of 259 at byte"):
        prepared(MegatronFile(index), tmp_path / "out")
    build(tmp_path / "corpus", [[[5, -1, 2]]], np.int32)
    with pytest.raises(DataError, match=r"corpus.bin: holds token -1, outside"):
        prepared(MegatronFile(index), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(DataError, match=r"corpus.bin: cannot be read .* copy it beside .*corpus.idx"):
        MegatronFile(index)


@pytest.mark.parametrize("batch", [1, 3, 1 << 22])
@pytest.mark.parametrize(
    ("ids", "wanted", "ends"),
    [
        ([5, 6, 2, 7, 2, 2, 8], [[5, 6, 2], [7, 2], [2], [8]], (None, 2)),  # cut off within the last
        ([5, 6, 2, 7, 2], [[5, 6, 2], [7, 2]], (None, 2)),
        ([1, 5, 2, 1, 7, 2], [[1, 5, 2], [1, 7, 2]], (1, 2)),
        ([1, 5, 6, 1, 1, 7], [[1, 5, 6], [1], [1, 7]], (1, None)),
        ([5, 6, 1, 7, 8, 9], [[5, 6], [1, 7, 8, 9]], (None, None)),
        ([5, 6, 7, 8], [[5, 6, 7, 8]], (None, None)),
    ],
)
def test_a_flat_array_is_cut_at_eos_or_bos(
    tmp_path: Path,
    ids: list[int],
    wanted: list[list[int]],
    ends: tuple[int | None, int | None],
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_files, "_BATCH", batch)
    for dtype in token_files.FLAT:
        (tmp_path / "validation.bin").write_bytes(np.array(ids, dtype).tobytes())
        shards = prepared(FlatFile(tmp_path / "validation.bin", dtype), tmp_path / dtype)
        assert documents_of(shards) == wanted and shards.manifest.ends == ends


def test_arrays_that_are_none(tmp_path: Path) -> None:
    for data in (b"", b"abc"):
        (tmp_path / "a.bin").write_bytes(data)
        with pytest.raises(DataError, match=f"its {len(data)} bytes are no array of uint16; give the type it has"):
            prepared(FlatFile(tmp_path / "a.bin", "uint16"), tmp_path / "out")
    with pytest.raises(DataError, match="cannot be read"):
        prepared(FlatFile(tmp_path / "none.bin", "uint16"), tmp_path / "out")
    (tmp_path / "a.bin").write_bytes(np.array([5, 6, 2, 7, 2], np.int32).tobytes())
    with pytest.raises(DataError, match="every second uint16 in it is 0, so its ids are wider"):
        prepared(FlatFile(tmp_path / "a.bin", "uint16"), tmp_path / "out")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    index = build(tmp_path / "corpus", DOCUMENTS)
    call = ["--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model"), "--input"]
    assert prepare_data.main([*call, str(index.with_suffix(".bin"))]) == 0
    assert "out: 45 tokens, 5 documents, written" in capsys.readouterr().out
    assert open_shards(tmp_path / "out", tokenizer).manifest.ends == (None, 2)
    assert prepare_data.main([*call, str(index)]) == 0
    assert "up to date, reused" in capsys.readouterr().out
    flat = tmp_path / "validation.bin"
    flat.write_bytes(np.array([5, 2, 6, 2], "<u2").tobytes())
    assert prepare_data.main([*call, str(flat), "--tokens", "uint16"]) == 0
    assert "out: 4 tokens, 2 documents, written" in capsys.readouterr().out
    assert prepare_data.main([*call, str(flat)]) == 2
    assert "is binary data, which is not read" in (told := capsys.readouterr().err) and "--tokens" in told
    for more, said in (
        ([str(index), "--tokens", "uint16"], "says itself what its .bin holds"),
        ([str(flat), "--tokens", "uint16", "--bos", "true"], "are for text and conversations"),
    ):
        with pytest.raises(SystemExit):
            prepare_data.main([*call, *more])
        assert said in capsys.readouterr().err
