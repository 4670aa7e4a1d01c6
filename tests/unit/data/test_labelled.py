"""Axolotl's segments: tokens and labels by its own definition, what is left out, and the command from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from parallel.errors import DataError
from pipeline.data.chat import ChatTemplate
from pipeline.data.chat_records import read_records
from pipeline.data.conversations import RecordError, conversation_of
from pipeline.data.prepare_chat import prepare_chat
from pipeline.data.shards import SCORED, open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.support.chat_tokenizers import byte_level, pieces, save
from tools.prepare_data import main

IGNORED = -100
ROW = [(False, "<s>Where does"), (False, " the whale swim?"), (True, " In the sea."), (False, "\n"), (True, "Far.</s>")]


def record(*segments: tuple[Any, Any]) -> dict[str, Any]:
    return {"segments": [{"label": label, "text": text} for label, text in segments]}


def starting(made: Tokenizer) -> Tokenizer:
    """One that puts <s> before a text, as Llama's do."""
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.post_processor = start
    return made


@pytest.fixture(scope="module", params=[byte_level, pieces], ids=["byte level", "pieces"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("labelled") / "model", starting(request.param()))


def _by_definition(theirs: Any, segments: list[tuple[bool, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels as Axolotl's documentation of input_output tells: each text tokenized alone, joined, masked."""
    ids: list[int] = []
    labels: list[int] = []
    for label, text in segments:
        found = theirs(text, add_special_tokens=False)["input_ids"]
        ids += found
        labels += found if label else [IGNORED] * len(found)
    return ids, labels


TEXT = st.text(st.sampled_from("ab \n字é😀\u0301\x00") | st.characters(codec="utf-8"), max_size=6)
PIECE = TEXT | st.sampled_from(["", " ", "<s>", "</s>", "<|im_start|>user\n", "the whale"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(all_segments=st.lists(st.lists(st.tuples(st.booleans(), PIECE), max_size=5), min_size=1, max_size=4))
def test_tokens_and_labels_are_axolotls(all_segments: list[list[tuple[bool, str]]], folder: Path) -> None:
    made, theirs = _both(folder)
    kept = []
    for segments in [ROW, *all_segments]:
        try:
            kept.append((segments, conversation_of(record(*segments))))
        except RecordError:
            assert not any(label and text for label, text in segments)
    for (segments, _), sample in zip(kept, made.samples([said for _, said in kept]), strict=True):
        ids, labels = _by_definition(theirs, segments)
        if set(labels[1:]) <= {IGNORED}:
            assert str(sample) == "the loss would count none of its tokens"
            continue
        assert not isinstance(sample, Exception)
        assert sample.tokens.tolist() == ids
        assert [number if counted else IGNORED for number, counted in zip(ids, sample.scored, strict=True)] == labels


_loaded: dict[Path, tuple[ChatTemplate, Any]] = {}


def _both(folder: Path) -> tuple[ChatTemplate, Any]:
    if folder not in _loaded:
        _loaded[folder] = ChatTemplate(load_tokenizer(folder)), AutoTokenizer.from_pretrained(folder)
    return _loaded[folder]


def _as_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _as_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def _as_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    doubled = [json.dumps(row["segments"]).replace('"', '""') for row in rows]
    file.write_text("segments\n" + "".join(f'"{each}"\n' for each in doubled))
    return file


@pytest.mark.parametrize("write", [_as_lines, _as_parquet, _as_csv])
def test_the_command_shows_and_writes_them(
    write: Callable[[Path, list[dict[str, Any]]], Path],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [record(*ROW), record((False, "Where?")), record((False, "<s>Where?"), (True, " Here.</s>"))]
    file = write(tmp_path / ("rows.csv" if write is _as_csv else "rows"), rows)
    out = tmp_path / "out"
    command = ["--chat", "--input", str(file), "--output", str(out), "--tokenizer", str(folder), "--show", "2"]
    assert main(command) == 0
    told = capsys.readouterr()
    _, theirs = _both(folder)
    (first, labels), (last, _) = (
        _by_definition(theirs, segments) for segments in (ROW, [(0, "<s>Where?"), (1, " Here.</s>")])
    )
    number = sum(label != IGNORED for label in labels)
    assert f"{len(first)} tokens, {number} scored" in told.out
    assert "1 record is left out: none of its segments has the label true, so it has no answer (first: " in told.err
    assert "spell" not in told.err, "special tokens are meant to be there"
    shards = open_shards(out, load_tokenizer(folder))
    assert shards.read(0, shards.manifest.tokens).tolist() == first + last
    wanted = [label != IGNORED for label in labels]
    assert list((out / SCORED).read_bytes())[: len(first)] == wanted
    prepare_chat(file, tmp_path / "two", ChatTemplate(load_tokenizer(folder)), None, workers=2)
    for written in (tmp_path / "two").iterdir():
        assert written.read_bytes() == (out / written.name).read_bytes()


def test_other_names_and_other_forms_beside_them(folder: Path, tmp_path: Path) -> None:
    named = _as_lines(tmp_path / "named.jsonl", [{"parts": record(*ROW)["segments"], "segments": "of something else"}])
    (read,) = read_records(named, {"segments": "parts"})
    assert conversation_of(read.value, read.schema) == conversation_of(record(*ROW))
    mixed = _as_lines(tmp_path / "mixed.jsonl", [record(*ROW), {"question": "Where?", "answer": "Here."}])
    with pytest.raises(
        DataError, match=r"mixed\.jsonl: line 2 is of the schema question and answer, line 1 of segments"
    ):
        list(read_records(mixed))


def test_half_a_surrogate_in_each_of_two_segments_is_left_out(folder: Path) -> None:
    made, _ = _both(folder)
    with pytest.raises(RecordError, match="half a surrogate"):
        made.sample(conversation_of(record((False, "\ud83d"), (True, "\ude00 Here."))))
