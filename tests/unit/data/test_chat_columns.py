"""`longspan prepare --chat` on pairs, on columns of other names, and on what is for other training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from parallel.errors import DataError
from pipeline.data import prepare_chat as prepare_chat_module
from pipeline.data.chat import ChatTemplate
from pipeline.data.chat_records import read_records
from pipeline.data.conversations import Conversation, conversation_of
from pipeline.data.packing import IGNORE
from pipeline.data.prepare_chat import JOINED, prepare_chat
from pipeline.data.samples import training_windows
from pipeline.data.shards import SCORED, open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.support.chat_templates import SMOLLM_2
from tests.support.chat_tokenizers import byte_level, save
from tools.prepare_data import main

ASKS, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the sea."}
ROWS = [{"asked": f"Where is {n}?", "told": f"In the sea {n}.", "more": "" if n else "Look."} for n in range(4)]
AS = ["--columns", "instruction=asked,input=more,output=told"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model", byte_level())


def lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def call(file: Path, model: Path, *more: str) -> int:
    out = file.with_name("out")
    return main(["--chat", "--input", str(file), "--output", str(out), "--tokenizer", str(model), *more])


def test_columns_of_other_names(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "chat_template.jinja").write_text(SMOLLM_2)
    file = lines(tmp_path / "rows.jsonl", ROWS)
    for more, word in (
        (AS, "written"),
        (AS, "up to date, reused"),
        (["--columns", "input=asked,output=told"], "written"),
    ):
        assert call(file, model, *more) == 0
        assert word in capsys.readouterr().out
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    columns = {"instruction": "asked", "input": "more", "output": "told"}
    wanted = [
        conversation_of({"instruction": row["asked"], "input": row["more"], "output": row["told"]}) for row in ROWS
    ]
    for source in (file, tmp_path / "rows.parquet"):
        read = [conversation_of(record.value, record.schema) for record in read_records(source, columns)]
        assert read == wanted
    said = [[{"role": "user", "content": "Hi"}, ANSWER], [ASKS, ANSWER]]
    (tmp_path / "b.csv").write_text(
        "turns\tid\n" + "".join('"' + json.dumps(t).replace('"', '""') + '"\t1\n' for t in said)
    )
    records = list(read_records(tmp_path / "b.csv", {"messages": "turns"}))
    assert [record.value for record in records] == [{"messages": turns} for turns in said]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("instruction=asked,output=tolt", "line 1 has no tolt, which --columns names (it has asked, told, more)"),
        ("instruction=asked,output=told,system=tone", "no record has tone, which --columns names; correct the name."),
        ("messages=asked", "2 records are left out: its messages are no list"),
        ("prompt=asked", "is not what --columns says: read so, it has a prompt and no completion"),
        ("question=asked,output=told", "is not what --columns says: read so, it is no conversation"),
        ("asked=instruction", "knows no 'asked'; a record is read as messages, conversations, prompt, completion,"),
        ("instruction", "must be like instruction=question,output=answer, got 'instruction'"),
        ("output=a,output=b", "must be like instruction=question,output=answer"),
    ],
)
def test_columns_that_are_refused(
    columns: str, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "chat_template.jinja").write_text(SMOLLM_2)
    file = lines(tmp_path / "rows.jsonl", ROWS[:2])
    try:
        assert call(file, model, "--columns", columns) == 2
    except SystemExit as ended:  # of the parser
        assert ended.code == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_lists_in_csv(tmp_path: Path) -> None:
    """What prints a list in another way than JSON is not taken for the text of a prompt."""
    file, rows = tmp_path / "a.csv", [([ASKS], [ANSWER]), ("[1] Where?", "There.")]
    for prompt, completion in rows:
        cells = [json.dumps(cell) if isinstance(cell, list) else cell for cell in (prompt, completion)]
        file.write_text("prompt\tcompletion\n" + "\t".join('"' + cell.replace('"', '""') + '"' for cell in cells))
        (record,) = read_records(file)
        assert record.value == {"prompt": prompt, "completion": completion}
    file.write_text(f'prompt\tcompletion\n"{[ASKS]}"\t"{[ANSWER]}"\n')
    with pytest.raises(DataError, match=r"a\.csv: line 2, (prompt|completion), is not JSON"):
        list(read_records(file))
    file.write_text('instruction,output,history\nWhy?,So.,"[[""How?"", ""Thus.""]]"\nWhy?,So.,\n')
    longer, plain = (conversation_of(record.value) for record in read_records(file))
    assert isinstance(longer, Conversation) and isinstance(plain, Conversation)
    assert [message["content"] for message in longer.messages] == ["How?", "Thus.", "Why?", "So."]
    assert len(plain.messages) == 2


def test_columns_are_for_conversations(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(SystemExit):
        main(["--input", str(file), "--output", str(tmp_path / "out"), "--tokenizer", str(model), *AS])
    assert "--columns, --max-tokens and --show are for --chat" in capsys.readouterr().err


def test_plain_pairs_need_no_chat_template(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_chat_module, "BATCH_CHARACTERS", 60)
    rows = [{"prompt": f"Where is {n}? ", "completion": f"In the sea {n}."} for n in range(9)]
    file = lines(tmp_path / "rows.jsonl", rows)
    assert call(file, model, "--show", "1") == 0
    told = capsys.readouterr()
    assert "Where is 0? In the sea 0.</s>" in told.out and "9 conversations, " in told.out
    assert "9 prompts end inside a token that the completion goes on with (first: " in told.err
    # What is trained on: every completion with its end, and nothing of a prompt.
    made = ChatTemplate(load_tokenizer(model))
    windows = training_windows(open_shards(tmp_path / "out", made.tokenizer), 128, mask_documents=True)
    shown = []
    for index in range(len(windows)):
        window = windows.window(index)
        for number in range(int(window.document_ids.max()) + 1):
            labels = window.labels[window.document_ids == number]
            if (labels != IGNORE).any():
                shown.append(made.decode(labels[labels != IGNORE].tolist()))
    # The space before an answer is part of its first token.
    assert sorted(shown) == [f" {row['completion']}</s>" for row in rows]
    _, account = prepare_chat(file, tmp_path / "two", made, None, workers=2)
    assert account.remarked[JOINED] == 9
    assert (tmp_path / "two" / SCORED).is_file()
    for written in (tmp_path / "two").iterdir():
        assert written.read_bytes() == (tmp_path / "out" / written.name).read_bytes()
    lines(file, [{"messages": [ASKS, ANSWER]}])
    assert call(file, model) == 2
    wanted = f"{file}: line 1: {model}: has no chat template (a base model?); give one with --chat-template FILE."
    assert wanted in capsys.readouterr().err


def test_an_end_of_text_that_tokenizer_json_does_not_have(model: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    added = {"added_tokens_decoder": {"9000": {"content": "<|over|>"}}, "eos_token": "<|over|>"}
    (model / "tokenizer_config.json").write_text(json.dumps({**config, **added}))
    with pytest.raises(DataError, match=r"tokenizer\.json has no token 9000, which ends a text by the other files"):
        ChatTemplate(load_tokenizer(model)).sample(conversation_of({"prompt": "a", "completion": "b"}))


def test_an_end_of_text_that_is_not_among_the_added_tokens(tmp_path: Path) -> None:
    """As transformers, which adds what tokenizer_config.json names."""
    settings = json.loads(byte_level().to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] != "</s>"]
    folder = save(tmp_path / "model", Tokenizer.from_str(json.dumps(settings)))
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    sample = ChatTemplate(load_tokenizer(folder)).sample(conversation_of({"prompt": "Where?", "completion": " Far."}))
    assert sample.tokens.tolist() == theirs("Where? Far.</s>")["input_ids"]
    assert sample.tokens[-1] == theirs.eos_token_id


def test_a_long_prompt_is_cut_and_its_completion_kept(model: Path) -> None:
    made = ChatTemplate(load_tokenizer(model))
    prompt = "Where is it? " + " ".join(f"w{n}" for n in range(400)) + " So where?"
    whole = made.sample(conversation_of({"prompt": prompt, "completion": " In the sea."}))
    cut = made.truncated(whole, 300)
    assert cut.tokens.size == 300 and np.array_equal(cut.tokens[cut.scored], whole.tokens[whole.scored])
    assert made.decode(cut.tokens.tolist()).startswith("Where is it? w0")


def test_what_is_for_other_training_ends_with_its_place(model: Path, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"prompt": [ASKS], "chosen": [ANSWER], "rejected": [ANSWER], "score": 1.0}])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet: row 1 is a pair of preferences .*prompt=prompt,completion=chosen"
    ):
        list(read_records(tmp_path / "a.parquet"))
    (read,) = read_records(tmp_path / "a.parquet", {"prompt": "prompt", "completion": "chosen"})
    assert conversation_of(read.value) == conversation_of({"messages": [ASKS, ANSWER]})
    (tmp_path / "b.csv").write_text("prompt,completion,label\nWhere?,There.,\nWhere?,Here.,False\n")
    with pytest.raises(DataError, match=r"b\.csv: line 3 is an answer with a verdict"):
        list(read_records(tmp_path / "b.csv"))
    lines(
        tmp_path / "c.jsonl", [{"prompt": [ASKS], "completion": [ANSWER]}, {"prompt": "Where?", "completion": "There."}]
    )
    with pytest.raises(
        DataError, match=r"line 2 is of the schema prompt and completion as text, line 1 of prompt and "
    ):
        list(read_records(tmp_path / "c.jsonl"))
