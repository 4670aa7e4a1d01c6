"""What is left out of conversations, or of what their template shows, is counted and told, and never in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.data.card import read_card
from pipeline.data.chat import ChatTemplate
from pipeline.data.prepare_chat import prepare_chat
from pipeline.data.tokenizer import load_tokenizer
from tests.support import chat_templates
from tests.support.chat_tokenizers import byte_level, save
from tools.prepare_data import main

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASKS = {"role": "user", "content": "Is it warm?"}
CALLS: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}
RESULT, ANSWER = {"role": "tool", "content": "30"}, {"role": "assistant", "content": "Yes."}
ROWS = [
    {"messages": [ASKS, ANSWER]},
    {"messages": [ASKS, {**CALLS, "content": ""}, RESULT, ANSWER], "tools": [TOOL]},
    {"messages": [ASKS, ANSWER], "tools": [TOOL]},
    {"messages": [ASKS, {**CALLS, "content": "I look."}], "tools": [TOOL]},
    {"messages": [ASKS, CALLS], "tools": [TOOL]},
]
KNOWS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHOLE = (
    "{% for message in messages %}{{ '<|im_start|>' + (message | tojson) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)
"""Writes the whole message, of which it names no field."""
ROLES = chat_templates.SMOLLM_2


def prepared(folder: Path, template: str, rows: list[dict[str, Any]]) -> tuple[Any, Any, Path]:
    save(folder / "model", byte_level())
    (folder / "t.jinja").write_text(template)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ChatTemplate(load_tokenizer(folder / "model"), folder / "t.jinja")
    return *prepare_chat(folder / "rows.jsonl", folder / "out", chat, None), folder / "rows.jsonl"


@pytest.mark.parametrize("template", [ROLES, chat_templates.MARKED["SmolLM2"]], ids=["compared", "marked"])
def test_calls_that_are_not_shown_are_left_out_and_counted(tmp_path: Path, template: str) -> None:
    manifest, account, file = prepared(tmp_path, template, ROWS)
    assert manifest.documents == account.samples == 2
    reason = "the chat template does not show its tool calls (give one that knows tools with --chat-template)"
    assert account.refused == {reason: 3} and account.examples[reason] == f"{file}: line 2"
    left_out, offered = account.sentences()
    assert left_out == f"3 records are left out: {reason} (first: {file}: line 2)."
    assert offered == (
        "1 conversation offers tools whose definitions the chat template does not show (first: "
        f"{file}: line 3); give one that knows tools with --chat-template."
    )
    card = read_card(tmp_path / "out")
    assert card is not None and card["left_out"][reason]["count"] == 3 and card["warnings"] == [offered]


def test_a_template_that_knows_tools_shows_them_as_in_transformers(tmp_path: Path) -> None:
    manifest, account, _ = prepared(tmp_path, KNOWS, ROWS)
    assert manifest.documents == 5 and account.sentences() == []
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = ChatTemplate(load_tokenizer(tmp_path / "model"), tmp_path / "t.jinja")
    from pipeline.data.conversations import conversation_of

    for row in ROWS:
        text = theirs.apply_chat_template(row["messages"], tools=row.get("tools"), chat_template=KNOWS, tokenize=False)
        assert chat.text_of(conversation_of(row)) == text
        assert ("<tool_call>" in text) == any("tool_calls" in message for message in row["messages"])


def test_a_template_that_writes_all_of_a_message_shows_its_calls(tmp_path: Path) -> None:
    manifest, account, _ = prepared(tmp_path, WHOLE, [ROWS[0], ROWS[3]])
    assert manifest.documents == 2 and not account.refused
    assert account.remarked["without tools"] == 1


def test_the_command_says_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, file = prepared(tmp_path, ROLES, ROWS)
    arguments = ["--chat", "--input", str(file), "--output", str(tmp_path / "more")]
    assert main([*arguments, "--tokenizer", str(tmp_path / "model"), "--chat-template", str(tmp_path / "t.jinja")]) == 0
    err = capsys.readouterr().err
    assert "warning: 3 records are left out: the chat template does not show its tool calls" in err
    assert "warning: 1 conversation offers tools whose definitions the chat template does not show" in err


@pytest.mark.parametrize("value", [None, "hello", 3, {}])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_first_record_without_its_list_is_counted_as_others_are(key: str, value: Any, tmp_path: Path) -> None:
    turns = [ASKS, ANSWER] if key == "messages" else [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    manifest, account, file = prepared(tmp_path, ROLES, [{key: value}, {key: turns}, {key: value}])
    assert manifest.documents == 1
    assert account.sentences() == [f"2 records are left out: its {key} are no list (first: {file}: line 1)."]


def test_reasoning_that_is_not_shown_is_counted(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "b", "reasoning_content": "c"}
    row = {"messages": [{"role": "user", "content": "a"}, answer]}
    shown = "{{ message['content'] + '<|im_end|>' + '\\n'}}{% endgeneration %}"
    reads = chat_templates.MARKED["SmolLM2"].replace(shown, "{{ message.reasoning_content or '' }}" + shown)
    assert reads != chat_templates.MARKED["SmolLM2"]
    for number, (template, remarked) in enumerate([(chat_templates.MARKED["SmolLM2"], 1), (reads, 0)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        _, account, file = prepared(folder, template, [row])
        assert account.remarked["without reasoning"] == remarked
        assert account.sentences() == remarked * [
            "1 conversation has reasoning beside its answers (reasoning_content or the like), which the chat template "
            f"does not show (first: {file}: line 1); give one that does with --chat-template, or write it into the "
            "content."
        ]
