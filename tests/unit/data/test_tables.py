"""Parquet, Arrow and CSV as other programs write them, and one sentence with file and row for every bad one."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from parallel.errors import DataError
from pipeline.data.chat_records import conversation_files, read_records
from pipeline.data.conversations import conversation_of
from pipeline.data.discovery import find_texts
from pipeline.data.records import RecordReader, check_first_record
from pipeline.data.tables import ARROW, CSV, PARQUET

TEXTS = ["Call me Ishmael.", "zwei\nZeilen é 😀\r\n", 'a "quoted", text; with | marks\t', "\u2028 three \x0b end"]


def _stream(file: Path, table: pa.Table) -> None:
    """As `datasets.save_to_disk` writes: a stream of small batches."""
    with pa.OSFile(str(file), "wb") as sink, pa.RecordBatchStreamWriter(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _file(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _csv(mark: str) -> Callable[[Path, pa.Table], None]:
    def write(file: Path, table: pa.Table) -> None:
        with file.open("w", newline="", encoding="utf-8") as out:
            rows = csv.writer(out, delimiter=mark)
            rows.writerow(table.column_names)
            rows.writerows([["" if cell is None else cell for cell in row.values()] for row in table.to_pylist()])

    return write


WRITERS: dict[str, tuple[str, Callable[[Path, pa.Table], None]]] = {
    "parquet": (PARQUET, lambda file, table: parquet.write_table(table, file, row_group_size=3)),
    "parquet zstd": (PARQUET, lambda file, table: parquet.write_table(table, file, compression="zstd")),
    "stream": (ARROW, _stream),
    "file": (ARROW, _file),
    "feather": (ARROW, lambda file, table: feather.write_feather(table, str(file), compression="lz4")),
    "comma": (CSV, _csv(",")),
    "semicolon": (CSV, _csv(";")),
    "tab": (CSV, _csv("\t")),
}
BINARY = [name for name, (kind, _) in WRITERS.items() if kind != CSV]


def documents(path: Path, field: str = "text") -> list[tuple[str, int | None]]:
    return [(document.text, document.line) for document in RecordReader(path, field)]


def refused(path: Path, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        documents(path, field)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("how", WRITERS)
def test_a_table_is_one_document_a_row_whatever_its_name(tmp_path: Path, how: str) -> None:
    kind, write = WRITERS[how]
    many = TEXTS + [f"row {number} " + "x" * 50 * number for number in range(300)]
    table = pa.table({"id": range(len(many)), "text": many, "more": ["other"] * len(many)})
    for name in ("a.csv",) if kind == CSV else ("a.parquet", "a.arrow", "a.txt", "a.jsonl", "a.csv", "a"):
        file = tmp_path / name
        write(file, table)
        (found,) = find_texts(tmp_path).files
        assert (found.path, found.kind, found.packing) == (file, kind, "")
        check_first_record(found, "text")
        reader = RecordReader(file)
        read = list(reader)
        assert [document.text for document in read] == many
        if kind != CSV:
            assert [document.line for document in read] == list(range(1, len(many) + 1))
        assert reader.done_bytes == reader.total_bytes == file.stat().st_size
        file.unlink()


@pytest.mark.parametrize("how", BINARY)
def test_missing_texts_are_counted_and_kinds_of_strings_read(tmp_path: Path, how: str) -> None:
    for made in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(["one", None, " \n", "two"], pa.string()).cast(made)
        WRITERS[how][1](tmp_path / "a", pa.table({"body": column}))
        reader = RecordReader(tmp_path / "a", "body")
        assert [(document.text, document.line) for document in reader] == [("one", 1), ("two", 4)]
        assert reader.empty == 2


@pytest.mark.parametrize("how", WRITERS)
def test_columns_that_are_missing_or_no_strings(tmp_path: Path, how: str) -> None:
    _, write = WRITERS[how]
    write(tmp_path / "a.csv", pa.table({"body": ["one"], "id": [1]}))
    assert refused(tmp_path) == (
        f"{tmp_path / 'a.csv'}: the table has no field 'text' (it has body, id); set the text field to one of its own."
    )
    if WRITERS[how][0] != CSV:  # where everything is a string
        assert "row 1 holds int in field 'id', not a string" in refused(tmp_path / "a.csv", "id")
    write(tmp_path / "a.csv", pa.table({"messages": ["[]"], "id": [1]}))
    assert "prepare conversations with longspan prepare --chat" in refused(tmp_path / "a.csv")


@pytest.mark.parametrize("how", BINARY)
def test_a_damaged_table_is_one_sentence_and_never_fewer_rows(tmp_path: Path, how: str) -> None:
    write, file = WRITERS[how][1], tmp_path / "a.parquet"
    texts = [f"{number} " + "text " * 200 for number in range(64)]
    write(file, pa.table({"text": texts}))
    whole = file.read_bytes()
    for size in (9, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:size])
        if how == "stream" and size > len(whole) // 2:
            continue  # cut inside the mark of its end, behind the last row
        assert refused(file).startswith(f"{file}: ")
    for place in range(8, len(whole), max(1, len(whole) // 97)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read = documents(file)
        except DataError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        else:  # a flipped letter, or a byte that nobody reads
            assert len(read) == len(texts)


def test_what_is_not_a_table_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"<html>Not found</html>")
    assert "is not the Parquet that its name says" in refused(file)
    (tmp_path / "b.csv").write_text('{"text": "one"}\n')  # JSON lines under another name
    assert documents(tmp_path / "b.csv") == [("one", 1)]
    parquet.write_table(pa.table({"text": ["one"]}), file)
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert f"{packed}: is Parquet packed as gz; unpack it" in refused(packed)
    file.write_bytes(b"PARE" + bytes(64))
    assert "is encrypted Parquet, which is not read" in refused(file)


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    data = b'\xef\xbb\xbfid,text\r\n1,"two\r\nlines"\r\n\r\n2,"say ""x"""\r\n3,\r\n4,last'
    for pack in (bytes, gzip.compress, bz2.compress):
        file.write_bytes(pack(data))
        assert documents(file) == [("two\r\nlines", 2), ('say "x"', 5), ("last", 7)]
    for bad, said in {
        b"id,text\n1,a,b\n": "line 2 has 3 fields and the first line 2",
        b'id,text\n1,a\n2,"never closed\n3,b\n': "line 3 is not CSV (unexpected end of data)",
        b'id,text\n1,"a"b\n': "line 2 is not CSV",
        b"id,text\n1,\xff\xfe\n": "not UTF-8; convert the file",
        b"": "line 1 names no columns",
        b"text,text\na,b\n": "has two columns 'text'; rename one",
        b"\xff\xfet\0": "is UTF-16 text, not UTF-8",
        bz2.compress(b"id,text\n1,a\n")[:-3]: "the archive is truncated or corrupt",
        bz2.compress(b"id,text\n1,a\n")[:14] + b"?" + bz2.compress(b"id,text\n1,a\n")[15:]: "truncated or corrupt",
    }.items():
        file.write_bytes(bad)
        assert said in refused(file), (bad, refused(file))


def test_a_set_of_splits_is_not_all_trained_on(tmp_path: Path) -> None:
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        _stream(tmp_path / split / "data-00000-of-00001.arrow", pa.table({"text": [split]}))
        for note in ("state.json", "dataset_info.json"):
            (tmp_path / split / note).write_text(json.dumps({"_data_files": []}, indent=2))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    said = refused(tmp_path)
    assert "holds the splits test, train of a dataset" in said
    assert documents(tmp_path / "train") == [("train", 1)]
    for path in (tmp_path, tmp_path.parent):  # also below what is named
        with pytest.raises(DataError, match=f"{tmp_path}: holds the splits test, train"):
            conversation_files(path)


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In the sea.", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
]


@pytest.mark.parametrize("how", WRITERS)
def test_conversations_in_tables_are_those_of_json_lines(tmp_path: Path, how: str) -> None:
    kind, write = WRITERS[how]
    spoken = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    other = [{"role": "user", "content": "Call g."}, {"role": "assistant", "content": "Done.", "weight": 0}, *MESSAGES]
    other[3] = {**other[3], "tool_calls": [{"name": "g", "arguments": {"b": "x"}}]}
    cases: list[tuple[str, list[Any]]] = [
        ("messages", [MESSAGES, other]),
        ("conversations", [spoken, spoken * 2]),
        ("instruction", ["Say it.", "Again."]),
    ]
    for number, (column, values) in enumerate(cases):
        records = [
            {column: value, **({"output": "It."} if column == "instruction" else {}), "id": place}
            for place, value in enumerate(values)
        ]
        wanted = [conversation_of(json.loads(json.dumps(record))) for record in records]
        folder = tmp_path / str(number)
        folder.mkdir()
        if kind == CSV:
            records = [
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in record.items()}
                for record in records
            ]
        write(folder / ("a.csv" if kind == CSV else "train-00000.parquet"), pa.Table.from_pylist(records))
        (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
        (file,) = conversation_files(folder)
        read = list(read_records(file))
        assert [conversation_of(record.value) for record in read] == wanted
        assert read[1].where == f"{file}: " + ("line 3" if kind == CSV else "row 2")


def test_conversations_of_two_schemas_or_none_in_one_table(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = [
        {"messages": MESSAGES, "instruction": None, "output": None},
        {"messages": None, "instruction": "Say it.", "output": "It."},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(DataError, match="row 2 is of the schema Alpaca, row 1 of messages; split the file"):
        list(read_records(file))
    parquet.write_table(pa.table({"question": ["a"]}), file)
    with pytest.raises(DataError, match=r"row 1 is no conversation \(it has question\)"):
        list(read_records(file))
    file.write_bytes(b"words")
    with pytest.raises(DataError, match="does not begin as the Parquet of its name"):
        list(read_records(file))
    (tmp_path / "b.csv").write_text("messages\n[{'role': 'user'}]\n")
    with pytest.raises(DataError, match="b.csv: line 2, messages, is not JSON"):
        list(read_records(tmp_path / "b.csv"))


@pytest.mark.parametrize("how", ["parquet zstd", "stream", "file"])
def test_rows_are_read_a_few_at_a_time(tmp_path: Path, how: str) -> None:
    """60 MB in one row group or batch; what pyarrow holds is sampled at every row."""
    table = pa.table({"text": [f"{number} " + "words " * 10_000 for number in range(1000)]})
    file = tmp_path / "a"
    if how == "parquet zstd":
        parquet.write_table(table, file, compression="zstd", use_dictionary=False, write_batch_size=16)  # small pages
    else:
        maker = pa.RecordBatchStreamWriter if how == "stream" else pa.RecordBatchFileWriter
        with pa.OSFile(str(file), "wb") as sink, maker(sink, table.schema) as writer:
            writer.write_table(table)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in RecordReader(file).pieces()]
    assert len(held) == 1000 and max(held) < 12e6


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text\none\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "is Parquet, for which pyarrow is needed; run: python -m pip install 'pyarrow>=20'" in refused(
        tmp_path / "a.parquet"
    )
    assert documents(tmp_path / "b.csv") == [("one", 2)]


def test_a_quote_that_is_never_closed_does_not_take_the_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.tables._LONGEST_FIELD", 1000)
    (tmp_path / "a.csv").write_text('text\n"' + "words\n" * 1000)
    assert "line 2 is not CSV (field larger than field limit (1000))" in refused(tmp_path / "a.csv")
