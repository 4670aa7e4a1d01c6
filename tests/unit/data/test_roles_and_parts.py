"""Roles that a template may not know, and content in parts: as transformers has them, or refused and never dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.data.chat import ChatTemplate
from pipeline.data.conversations import RecordError, conversation_of
from pipeline.data.tokenizer import load_tokenizer
from tests.support.chat_templates import MISTRAL, PUBLISHED, SMOLLM_2
from tests.support.chat_tokenizers import byte_level, save

ASKS, ANSWER = {"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": "Yes."}
DEVELOPER = {"role": "developer", "content": "Answer in one word."}
KNOWN = (
    "{% if messages[0].role in ['system', 'developer'] %}{{ '<|im_start|>developer' + messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role not in ['system', 'developer'] %}{{ '<|im_start|>' + m.role + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
"""As gpt-oss and Gemma 4 read it: another name of system."""
DROPS = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}{{ '<|im_start|>' + m.role + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
"""As Qwen2.5, Phi-3 and DeepSeek: one branch for each role, and none for another."""
REFUSES = DROPS.replace(
    "{% endif %}{% endfor %}", "{% else %}{{ raise_exception('Unexpected role') }}{% endif %}{% endfor %}"
)
"""As Qwen3.5."""
AS_JSON = "m.role + (m.content if m.role == 'assistant' else m.content | tojson)"
TRIMS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}{% if m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
"""As Gemma 3 takes parts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "model", byte_level())


def made(folder: Path, place: Path, source: str) -> ChatTemplate:
    (place / "t.jinja").write_text(source)
    return ChatTemplate(load_tokenizer(folder), place / "t.jinja")


def theirs(folder: Path, source: str, messages: list[dict[str, Any]]) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False))


@pytest.mark.parametrize("source", [SMOLLM_2, PUBLISHED["Llama-3"], KNOWN], ids=["ChatML", "Llama-3", "known"])
def test_a_template_that_shows_developers_gets_them(folder: Path, tmp_path: Path, source: str) -> None:
    messages = [DEVELOPER, ASKS, ANSWER]
    text = made(folder, tmp_path, source).text_of(conversation_of({"messages": messages}))
    assert text == theirs(folder, source, messages) and DEVELOPER["content"] in text


@pytest.mark.parametrize("source", [DROPS, REFUSES], ids=["drops", "refuses"])
def test_a_template_without_developers_is_told_of(folder: Path, tmp_path: Path, source: str) -> None:
    chat = made(folder, tmp_path, source)
    with pytest.raises(RecordError, match=r"knows no role developer \(name it system, or give one that does with"):
        chat.sample(conversation_of({"messages": [DEVELOPER, ASKS, ANSWER]}))
    assert "one word" in chat.text_of(conversation_of({"messages": [{**DEVELOPER, "role": "system"}, ASKS, ANSWER]}))


def test_what_is_refused_for_another_reason_is_told_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="the chat template refuses it .Conversation roles must alternate"):
        made(folder, tmp_path, MISTRAL).sample(conversation_of({"messages": [DEVELOPER, ASKS, ANSWER]}))


def test_no_message_is_dropped_in_silence(folder: Path, tmp_path: Path) -> None:
    chat = made(folder, tmp_path, DROPS)
    looked = [ASKS, {**ANSWER, "content": "I look."}, {"role": "tool", "content": "30 degrees"}, ANSWER]
    with pytest.raises(RecordError, match="does not show its tool message .give one that does with --chat-template"):
        chat.sample(conversation_of({"messages": looked}))
    # Written down otherwise is shown, and what is dropped of an answer is the template's own way, as of reasoning.
    as_json = made(folder, tmp_path, DROPS.replace("m.role + m.content", AS_JSON))
    quoted = [{**ASKS, "content": 'Is "it" warm?\n'}, ANSWER]
    assert as_json.sample(conversation_of({"messages": quoted})).scored.any()
    last = made(folder, tmp_path, SMOLLM_2.replace("message['content']", "message['content'].split('</think>')[-1]"))
    thought = [ASKS, {**ANSWER, "content": "<think>Hm.</think>Yes."}]
    assert last.text_of(conversation_of({"messages": thought})).endswith("assistant\nYes.<|im_end|>\n")


@pytest.mark.parametrize("source", [TRIMS, SMOLLM_2], ids=["takes parts", "takes text"])
def test_parts_are_joined_as_the_template_does(folder: Path, tmp_path: Path, source: str) -> None:
    parts = [{"type": "text", "text": " Is it "}, {"type": "text", "text": " warm? "}]
    said = conversation_of({"messages": [{**ASKS, "content": parts}, {**ANSWER, "content": [{"text": "Yes."}]}]})
    content = parts if source == TRIMS else " Is it  warm? "
    text = made(folder, tmp_path, source).text_of(said)
    assert text == theirs(folder, source, [{**ASKS, "content": content}, ANSWER])
    assert ("Is itwarm?" in text) == (source == TRIMS)
