"""Which token ends answers, in the templates of the families, and what is told where none is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import DataError
from pipeline.data.answer_ends import ChatFormat, EndFinder, format_of, trained_format
from pipeline.data.chat import ChatTemplate
from pipeline.data.prepare_chat import prepare_chat
from pipeline.data.shards import MANIFEST, open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.support.chat_templates import LLAMA_3, MARKED, PUBLISHED, QWEN_2
from tests.support.chat_tokenizers import byte_level, pieces, save

ENDS = {"Llama-2": "</s>", "Llama-3": "<|eot_id|>", "Qwen2": "<|im_end|>", "SmolLM2": "<|im_end|>", "Mistral": "</s>"}
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<|start_header_id|>' + role + '\\n' + message['content'] | trim + '<|eot_id|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|start_header_id|>model\\n'}}{% endif %}"
)
TURNS = zip(("user", "assistant") * 2, "qAqA", strict=True)
ROWS = [{"messages": [{"role": role, "content": text} for role, text in TURNS]}]


def _prepared(root: Path, template: str, tokenizer: Any = None, rows: list[dict[str, Any]] = ROWS) -> tuple[Any, Any]:
    root.mkdir(exist_ok=True)
    model = save(root / "model", tokenizer or byte_level())
    (root / "t.jinja").write_text(template)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ChatTemplate(load_tokenizer(model), root / "t.jinja")
    manifest, account = prepare_chat(root / "rows.jsonl", root / "out", made, None)
    return manifest, account


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("family", ENDS)
def test_the_token_that_ends_answers_is_trained_and_recorded(tmp_path: Path, family: str, marked: bool) -> None:
    tokenizer = pieces() if family in ("Llama-2", "Mistral") else byte_level()
    template = (MARKED if marked else PUBLISHED)[family]
    manifest, account = _prepared(tmp_path, template, tokenizer)
    assert manifest.answer_ends == (tokenizer.token_to_id(ENDS[family]),) and manifest.template == template
    assert account.ends.total() == 2 and not account.remarks()
    shards = open_shards(tmp_path / "out")
    assert shards.manifest.answer_ends == manifest.answer_ends
    assert shards.scored is not None
    tokens = shards.read(0, len(shards))
    assert sum(tokens[shards.scored != 0] == manifest.answer_ends[0]) == 2


def test_blanks_may_stand_behind_it(tmp_path: Path) -> None:
    manifest, account = _prepared(tmp_path, GEMMA)
    assert manifest.answer_ends == (byte_level().token_to_id("<|eot_id|>"),) and not account.remarks()


def test_of_plain_pairs_it_is_the_end_of_text(tmp_path: Path) -> None:
    manifest, account = _prepared(tmp_path, QWEN_2, rows=[{"prompt": "q", "completion": " A"}])
    assert manifest.answer_ends == (byte_level().token_to_id("</s>"),) and not account.remarks()


def test_a_template_that_nothing_went_through_is_not_recorded(tmp_path: Path) -> None:
    """Plain pairs and segments are joined as they are: exports told to ask a model by what it never saw."""
    segments = {"segments": [{"label": False, "text": "q"}, {"label": True, "text": "A</s>"}]}
    plain = []
    for name, row in (("pairs", {"prompt": "q", "completion": " A"}), ("segments", segments)):
        plain.append(_prepared(tmp_path / name, QWEN_2, rows=[row])[0])
        assert plain[-1].template == "" and plain[-1].answer_ends == (byte_level().token_to_id("</s>"),)
    turns, _ = _prepared(tmp_path / "turns", LLAMA_3)
    assert turns.template == LLAMA_3
    found, told = trained_format([*plain, turns])
    assert found is not None and found.template == LLAMA_3 and told == ()


def test_what_an_answer_spells_is_no_end(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "A"}, {"instruction": "q", "output": "<s>"}]
    manifest, _ = _prepared(tmp_path, LLAMA_3, rows=rows)
    assert manifest.answer_ends == (byte_level().token_to_id("<|eot_id|>"),)


@pytest.mark.parametrize(
    "template",
    [
        LLAMA_3.replace("<|eot_id|>", "<|no_token|>"),
        MARKED["Qwen2"].replace(
            "{{ message['content'] + '<|im_end|>' + '\\n'}}{% endgeneration %}",
            "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' + '\\n'}}",
        ),
    ],
)
def test_no_end_that_is_trained_is_told(tmp_path: Path, template: str) -> None:
    manifest, account = _prepared(tmp_path, template)
    assert manifest.answer_ends == ()
    (told,) = account.remarks()
    assert told == (
        f"1 conversation has no answer that ends with a special token which the loss counts (first: "
        f"{tmp_path / 'rows.jsonl'}: line 1), so the model does not learn to stop; give a template that ends answers "
        "with a token of this tokenizer, inside its {% generation %} marks if it has any."
    )


def test_added_tokens_count_where_no_special_one_ends_an_answer() -> None:
    import numpy as np

    from pipeline.data.masks import Sample

    # 1: special, 2 and 3: added, 4: a blank, others: text
    finder = EndFinder(frozenset({1}), frozenset({2, 3}), lambda ids: " " if ids == [4] else "x")

    def found(*tokens: int) -> dict[int, int]:
        return dict(finder.ends(sample(*tokens))[0])

    def sample(*tokens: int) -> Sample:
        return Sample(np.array([9, *tokens], np.uint32), np.array([False, *(True for _ in tokens)]))

    assert found(8, 2, 1, 4) == {1: 1}  # a tool call's own end is not the answer's
    assert found(8, 2, 3, 4) == {3: 1}
    assert found(8, 1, 8) == {} == found(2, 8)
    assert finder.ends(sample(8, 1, 8, 1))[1] == {1} and finder.ends(sample(8, 1, 4, 1))[1] == set()


def test_no_stop_at_a_token_that_answers_go_on_behind(tmp_path: Path) -> None:
    """As in gpt-oss, where <|end|> ends the reasoning and, but in the last turn, answers."""
    template = MARKED["Qwen2"].replace(
        "{{ message['content'] + '<|im_end|>' + '\\n'}}{% endgeneration %}",
        "{{ 'hm<|im_end|>' + message['content'] }}{{ '<|eot_id|>' if loop.last else '<|im_end|>' }}{% endgeneration %}",
    )
    assert template != MARKED["Qwen2"]
    manifest, account = _prepared(tmp_path, template)
    assert len(account.ends) == 2 and manifest.answer_ends == (byte_level().token_to_id("<|eot_id|>"),)


def test_several_templates_are_told_and_damage_is_refused(tmp_path: Path) -> None:
    manifest, _ = _prepared(tmp_path, LLAMA_3)
    other = replace(manifest, template=QWEN_2, answer_ends=(1,))
    text = replace(manifest, chat="", template="", answer_ends=())
    assert trained_format([text]) == (None, ())
    assert trained_format([text, manifest]) == (ChatFormat(LLAMA_3, manifest.answer_ends), ())
    found, told = trained_format([manifest, other])
    assert found == ChatFormat(LLAMA_3, (1, *manifest.answer_ends))
    assert told == ("data.path: its conversations went through 2 chat templates; an export takes the first's.",)
    assert found is not None and format_of(json.loads(json.dumps(found.recorded()))) == found
    for damaged in ("x", {"answer_ends": ["x"]}, {"template": 1}, {"answer_ends": 2}):
        with pytest.raises(ValueError, match=r"chat|answer_ends"):
            format_of(damaged)
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({**record, "answer_ends": [1 << 20]}))
    with pytest.raises(DataError, match="answer_ends has 1048576"):
        open_shards(tmp_path / "out")
