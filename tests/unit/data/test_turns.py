"""Rendering beside transformers' own renderer, and beginnings told from one rendering beside beginnings rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from parallel.errors import DataError
from pipeline.data.conversations import Conversation, RecordError
from pipeline.data.rendering import Renderer
from pipeline.data.turns import STUMBLES, Turns
from tests.support.chat_templates import MARKED, PUBLISHED

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
GOLDEN = json.loads(Path(__file__).with_name("trl_golden.json").read_text(encoding="utf-8"))["templates"]
FAMILIES = {**PUBLISHED, "qwen2_5": GOLDEN["qwen2_5"]}
FAMILIES_MARKED = {**MARKED, "qwen2_5": GOLDEN["qwen2_5_training"]}
FIELDS = (
    "{{ tools | tojson if tools else '-' }}{% for m in messages %}{{ m.role }}{{ m | tojson }}"
    "{% if m.thinking is defined %}({{ m.thinking }}){% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


def _theirs(
    source: str, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    texts, spans = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=marks,
        add_generation_prompt=prompt,
        **NAMES,
    )
    return texts[0], [tuple(span) for span in spans[0]] if marks else []


def _by_beginnings(source: str, said: Conversation) -> tuple[str, list[tuple[int, int]]] | str:
    """By the definition, each beginning rendered by transformers; or why there is nothing."""
    try:
        text, _ = _theirs(source, said.messages, said.tools, False)
        spans = []
        for place, message in enumerate(said.messages):
            if message["role"] == "assistant":
                before, _ = _theirs(source, said.messages[:place], said.tools, True)
                until, _ = _theirs(source, said.messages[: place + 1], said.tools, False)
                if not (until.startswith(before) and text.startswith(until)):
                    return "unstable"
                spans.append((len(before), len(until)))
    except STUMBLES:
        return "refused"
    return text, [span for span, wanted in zip(spans, said.trained, strict=True) if wanted]


def _ours(source: str, said: Conversation) -> tuple[str, list[tuple[int, int]]] | str:
    try:
        return Renderer(source, NAMES, Path("model")).rendered(said)
    except RecordError:
        return "refused"
    except DataError:
        return "unstable"


TEXT = st.text(st.sampled_from("ab \n<|>{}%é😀\u2028assistant"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
MORE = st.dictionaries(
    st.sampled_from(["name", "tool_calls", "reasoning_content", "thinking", "reasoning", "extra"]), JSON, max_size=2
)


@st.composite
def conversations(draw: st.DrawFn, more: bool = True) -> Conversation:
    def said(role: str) -> dict[str, Any]:
        return {**(draw(MORE) if more else {}), "role": role, "content": draw(TEXT)}

    turns = [said(role) for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
    system = [said("system")] if draw(st.booleans()) else []
    trained = draw(st.lists(st.booleans(), min_size=len(turns) // 2, max_size=len(turns) // 2))
    tools = (
        draw(st.none() | st.lists(st.dictionaries(TEXT, JSON, max_size=2), min_size=1, max_size=2)) if more else None
    )
    return Conversation([*system, *turns], tools, tuple(trained))


@pytest.mark.parametrize("family", [*FAMILIES, "fields"])
@given(said=conversations())
def test_answers_are_where_comparing_beginnings_tells(family: str, said: Conversation) -> None:
    source = FIELDS if family == "fields" else FAMILIES[family]
    before = json.dumps(said.messages)
    assert _ours(source, said) == _by_beginnings(source, said)
    assert json.dumps(said.messages) == before, "the template was given the messages themselves"


@pytest.mark.parametrize("family", FAMILIES_MARKED)
@given(said=conversations())
def test_marks_are_those_of_transformers(family: str, said: Conversation) -> None:
    source = FAMILIES_MARKED[family]
    try:
        text, spans = _theirs(source, said.messages, said.tools, False, True)
    except STUMBLES:
        assert _ours(source, said) == "refused"
        return
    kept = [span for span, wanted in zip(spans, said.trained, strict=True) if wanted]
    assert _ours(source, said) == (text, kept)


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_templates_are_rendered_once(family: str) -> None:
    renderer = Renderer(PUBLISHED[family], NAMES, Path("model"))
    assert isinstance(renderer._turns, Turns)
    prompt = _theirs(PUBLISHED[family], [{"role": "user", "content": "a"}], None, True)[0]
    assert prompt.endswith(renderer._turns.prompted) and (renderer._turns.prompted != "") == (
        family not in ("Llama-2", "Mistral")
    )


BEFORE = (
    "{{ bos_token }}",
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}",
    "{% set ns = namespace(seen=0) %}",
    "{% for tool in tools or [1, 2] %}{{ tool }}{% if not loop.last %},{% endif %}{% endfor %}",
)
BEFORE_ELSE = (
    "{% set rest = messages[1:] %}",
    "{% set ns = namespace(seen=0, count=messages | length) %}{{ ns.count }}",
    "{{ messages[-1].content }}",
    "{% set bos_token = messages[0].content %}",
    "{% set add_generation_prompt = true %}",
    "{% if messages[1] is defined %}+{% endif %}",
    "{% if add_generation_prompt %}?{% endif %}",
    "{% macro said(m) %}{{ m.content }}{{ messages | length }}{% endmacro %}",
)
TURN = (
    "{{ m.role }}:{{ m['content'] }}",
    "{{ m.content | trim }}{{ eos_token }}",
    "{% if loop.first %}<{{ messages[0].content }}>{% endif %}",
    "{{ loop.index }}",
    "{% set ns.seen = ns.seen + 1 %}{{ ns.seen }}",
    "{% for part in m.content.split() %}{{ part }}{% if not loop.last %}/{% endif %}{% endfor %}",
    "{% if m.role == 'assistant' %}{{ m.content }}{% else %}[{{ m.content }}]{% endif %}",
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "{% set kept %}{{ m.content }}{% endset %}{{ kept }}",
)
TURN_ELSE = (
    "{% if loop.last %}.{% endif %}",
    "{% if loop.nextitem is defined %},{% endif %}",
    "{{ loop.index0 }}{{ loop.length }}",
    "{{ messages | length }}",
    "{{ messages[loop.index0].content }}",
    "{{ messages[loop.index0 - 1].content }}",
    "{{ rest[-1].content }}",
    "{{ add_generation_prompt }}",
    "{% for other in messages %}{{ other.role[0] }}{% endfor %}",
    "{% if m.content == '' %}{% break %}{% endif %}",
    "{{ said(m) if said is defined else '' }}",
    "{{ [messages] | map('length') | list }}",
    "{{ messages[1:] | length }}",
)
BEHIND = (
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "{{ 'assistant:' if add_generation_prompt }}",
    "{{ eos_token }}",
    "end",
)
BEHIND_ELSE = (
    "{{ bos_token }}",
    "{{ ns.seen }}",
    "{{ messages | length }}",
    "{{ messages[0].role }}",
    "{{ m }}{{ kept }}",
    "{% if rest is defined %}{{ rest[-1].content }}{% endif %}",
    "{{ 1 / add_generation_prompt }}",
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    known = draw(st.booleans())  # only what may stand in a template that goes turn by turn

    def some(pieces: tuple[str, ...], others: tuple[str, ...], most: int) -> str:
        drawn = st.sampled_from(pieces if known else pieces + others)
        return "".join(draw(st.lists(drawn, max_size=most, unique=True)))

    before = some(BEFORE, BEFORE_ELSE, 2)
    over = ["rest"] if known and "rest" in before else ["messages", "messages[1:]"]
    over += [] if known else ["rest", "messages if m.content", "rest or messages"]
    end = "{% endfor %}" if known else draw(st.sampled_from(["{% endfor %}", "{% else %}none{% endfor %}"]))
    loop = f"{{% for m in {draw(st.sampled_from(over))} %}}{some(TURN, TURN_ELSE, 4)}{end}"
    return before + loop + some(BEHIND, BEHIND_ELSE, 2)


once: list[bool] = []


@settings(max_examples=200)
@given(source=templates(), said=conversations(more=False))
def test_what_is_rendered_once_is_as_if_beginnings_were_rendered(source: str, said: Conversation) -> None:
    once.append(Renderer(source, NAMES, Path("model"))._turns is not None)
    assert _ours(source, said) == _by_beginnings(source, said)


def test_templates_of_both_kinds_were_tried() -> None:
    assert len(once) > 100 and sum(once) > len(once) // 10 and not all(once)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ strftime_now('%f') }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ lipsum() }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ [1, 2, 3] | random }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ self }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_what_is_not_known_to_go_turn_by_turn(source: str) -> None:
    assert Renderer(source, NAMES, Path("model"))._turns is None
