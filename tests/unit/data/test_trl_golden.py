"""Tokens and masks of conversations are those that TRL's trainer makes (trl_golden.py wrote them down)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pipeline.data.chat import ChatTemplate
from pipeline.data.conversations import conversation_of
from pipeline.data.masks import Sample
from pipeline.data.tokenizer import load_tokenizer
from tests.support.chat_templates import MARKED, PUBLISHED
from tests.support.chat_tokenizers import save
from tests.unit.data.trl_golden import PAIRS, starting

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("trl_golden.json").read_text(encoding="utf-8"))
OWN = GOLDEN["templates"]
MARKED_ALL = {**MARKED, "qwen2_5": OWN["qwen2_5_training"]}
PUBLISHED_ALL = {**PUBLISHED, "qwen2_5": OWN["qwen2_5"]}
CHATML = ("Qwen2", "SmolLM2", "qwen2_5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: save(tmp_path_factory.mktemp("tokenizers") / "model", Tokenizer.from_str(json.dumps(record)))
        for kind, record in GOLDEN["tokenizers"].items()
    }


@pytest.mark.parametrize("family", PUBLISHED_ALL)
@pytest.mark.parametrize("kind", GOLDEN["tokenizers"])
def test_as_trl_prepares_them(kind: str, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def template(source: str, name: str) -> ChatTemplate:
        (tmp_path / name).write_text(source)
        return ChatTemplate(load_tokenizer(folders[kind]), tmp_path / name)

    marked, plain = template(MARKED_ALL[family], "marked"), template(PUBLISHED_ALL[family], "plain")
    cases = [case for case in GOLDEN["cases"] if (case["tokenizer"], case["family"]) == (kind, family)]
    assert len(cases) >= 2
    for case in cases:
        messages = case["messages"]
        only_last = [
            {**message, "train": False} if message["role"] == "assistant" else message for message in messages[:-1]
        ]
        tokens, last = case["last"]["tokens"], list(case["last"]["scored"])
        if kind == "pieces" and family in CHATML:
            # The last character, a line's end behind a special token, is two tokens here. TRL's assistant masks, which
            # are transformers', count the first of them; its completion masks count both, and we are with the former.
            last[-1] = 0
        checked = [(marked, messages, case["all"]["scored"]), (plain, [*only_last, messages[-1]], last)]
        if family in PUBLISHED:
            # Of one family marks and comparison tell the same; TRL's for Qwen2.5 also count the line's end before.
            checked += [(plain, messages, case["all"]["scored"]), (marked, [*only_last, messages[-1]], last)]
        for made, given, wanted in checked:
            sample = made.sample(conversation_of({"messages": given}))
            assert sample.tokens.tolist() == tokens == case["all"]["tokens"]
            assert sample.scored.astype(int).tolist() == wanted, made.decode(sample.tokens.tolist())


@pytest.mark.parametrize("kind", GOLDEN["tokenizers"])
def test_pairs_of_messages_as_trl_prepares_them(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Only the answers of the completion, of which there are two, are scored."""
    cases = [case for case in GOLDEN["cases"] if case["tokenizer"] == kind and "several" in case]
    assert len(cases) == len(MARKED_ALL)
    for case in cases:
        (tmp_path / "marked").write_text(MARKED_ALL[case["family"]])
        made = ChatTemplate(load_tokenizer(folders[kind]), tmp_path / "marked")
        turns = case["several"]["messages"]
        sample = made.sample(conversation_of({"prompt": turns[:3], "completion": turns[3:]}))
        assert sample.tokens.tolist() == case["several"]["tokens"]
        scored = sample.scored.astype(int)
        if case["family"] == "qwen2_5":
            # TRL's marks for it take in the line's end before an answer, which behind a prompt is the prompt's.
            scored[scored.argmax()] = 0
        assert scored.tolist() == case["several"]["scored"]


@pytest.mark.parametrize("place", range(len(GOLDEN["plain"])))
def test_plain_pairs_as_trl_prepares_them(place: int, tmp_path: Path) -> None:
    case = GOLDEN["plain"][place]
    tokenizer = Tokenizer.from_str(json.dumps(GOLDEN["tokenizers"][case["tokenizer"]]))
    folder = save(tmp_path / "model", starting(tokenizer) if case["starts"] else tokenizer, **case["config"])
    made = ChatTemplate(load_tokenizer(folder))
    said = [conversation_of({"prompt": prompt, "completion": completion}) for prompt, completion in PAIRS]
    joined = 0
    for sample, wanted in zip(made.samples(said), case["made"], strict=True):
        assert isinstance(sample, Sample)
        assert sample.tokens.tolist() == wanted["tokens"]
        assert sample.scored.astype(int).tolist() == wanted["scored"]
        joined += sample.joined
    assert 0 < joined < len(PAIRS)
