"""Forms of records: what each says, which are refused and how, and which of their answers count."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.conversations import Completion, Conversation, Labelled, RecordError, conversation_of
from pipeline.data.schemas import COLUMNS, FLAT, LISTS, PLAIN, SEGMENTS, SPOKEN, NoSchema, schema_of

ASKS, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SHOWN, COUNTED = {"label": False, "text": "Q"}, {"label": True, "text": "A"}
SAID = [{"role": "system", "content": "S"}, ASKS, ANSWER]
IN_CONTEXT = [{"role": "user", "content": "Q\n\nC"}, ANSWER]
READ: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"instruction": "Q", "input": "C", "output": "A"}, IN_CONTEXT),
    ({"instruction": "Q", "input": "", "output": "A", "text": "### Q", "prompt": "Q"}, [ASKS, ANSWER]),
    ({"instruction": "", "input": "Q", "output": "A"}, [ASKS, ANSWER]),
    ({"instruction": "Q", "context": "C", "response": "A", "category": "open_qa"}, IN_CONTEXT),
    ({"instruction": "Q", "input": "C", "response": "A"}, IN_CONTEXT),
    ({"question": "Q", "answer": "A"}, [ASKS, ANSWER]),
    ({"system_prompt": "S", "question": "Q", "response": "A"}, SAID),
    ({"query": "Q", "response": "A", "original_question": "?"}, [ASKS, ANSWER]),
    ({"input": "Q", "output": "A", "system": "S"}, SAID),
    ({"instruction": "Q", "output": "A", "system": "S", "history": []}, SAID),
    (
        {"instruction": "Q", "output": "A", "history": [["one", "two"]]},
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, ASKS, ANSWER],
    ),
    ({"messages": [ASKS, ANSWER], "system": "S"}, SAID),
    ({"messages": SAID, "system": "another"}, SAID),
    ({"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [ASKS, ANSWER]),
    (
        {"conversations": [{"role": "human", "content": "Q"}, {"role": "gpt", "content": None, "value": "A"}]},
        [ASKS, ANSWER],
    ),
    ({"conversations": [ASKS, ANSWER], "instruction": "I", "response": "R"}, [ASKS, ANSWER]),
    ({"messages": None, "prompt": None, "completion": None, "question": "Q", "answer": "A"}, [ASKS, ANSWER]),
    ({"prompt": SAID[:2], "completion": [ANSWER]}, SAID),
    ({"messages": [ASKS, ANSWER], "segments": [SHOWN, COUNTED]}, [ASKS, ANSWER]),
    ({"question": "Q", "answer": "A", "segments": [{"start": 0.5, "text": "Q"}]}, [ASKS, ANSWER]),
    ({"prompt": "Q", "messages": [ASKS, ANSWER], "chosen": [ASKS, ANSWER], "rejected": [ASKS, ANSWER]}, [ASKS, ANSWER]),
]


@pytest.mark.parametrize(("record", "messages"), READ)
def test_forms_that_say_the_same(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    said = conversation_of(record)
    assert said == conversation_of({"messages": messages})
    assert isinstance(said, Conversation) and said.messages == messages and all(said.trained)


TAKES = "which supervised fine-tuning does not take"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Q", "completion": [ANSWER]}, "has a prompt that is text and a completion that is messages; give both"),
    ({"prompt": [ASKS], "completion": ANSWER}, "a prompt that is messages and a completion that is neither text nor"),
    ({"prompt": 3, "completion": None}, "has a prompt that is neither text nor messages"),
    ({"prompt": "Q"}, r"has a prompt and no completion \(it has prompt\); name the answer with --columns"),
    ({"prompt": "Q", "response": "A"}, r"instruction=prompt,output=KEY \(through the chat template\)"),
    ({"chosen": SAID, "rejected": SAID}, f"preferences .*{TAKES}.* give --columns messages=chosen"),
    ({"prompt": "Q", "chosen": SAID, "rejected": SAID}, "give --columns messages=chosen"),
    ({"prompt": [ASKS], "chosen": [ANSWER], "rejected": [ANSWER]}, "--columns prompt=prompt,completion=chosen"),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "--columns prompt=prompt,completion=chosen"),
    ({"conversations": [ASKS], "chosen": ANSWER, "rejected": ANSWER}, "keep what is chosen as the answer"),
    ({"instruction": "Q", "chosen": "A", "rejected": "B"}, "keep what is chosen as the answer"),
    ({"prompt": "Q", "completion": "A", "label": 0}, f"verdict on it .as for KTO., {TAKES}; keep those whose label is"),
    ({"messages": SAID, "label": False}, "without the label"),
    ({"instruction": "Q", "output": "A", "kto_tag": True}, "keep those whose kto_tag is true, without the kto_tag"),
    (
        {"question": "Q", "context": "C", "answer": "A"},
        "has answer, context, question, and it is not known what stands",
    ),
    ({"question": "Q", "answer": "A", "response": "B"}, "say it with --columns, such as"),
    ({"instruction": "Q", "input": "C", "context": "D", "output": "A"}, "has context, input, instruction, output, and"),
    ({"text": "a book"}, r"is no conversation \(it has text\); prepare text without --chat, or say"),
    (
        {"question": "Q", "answers": {"text": ["A"]}},
        r"is no conversation \(it has answers, question\); say what stands",
    ),
    ({}, "it has nothing"),
]


@pytest.mark.parametrize(("record", "words"), REFUSED)
def test_forms_that_are_refused(record: dict[str, Any], words: str) -> None:
    with pytest.raises(NoSchema, match=words):
        schema_of(record)


LEFT_OUT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Q", "completion": " "}, "an answer is empty"),
    ({"prompt": None, "completion": "A"}, "its prompt is missing"),
    ({"prompt": "Q", "completion": "A", "system": "S"}, "has system beside a prompt of plain text"),
    ({"prompt": [ASKS], "completion": []}, "its prompt or completion is missing"),
    ({"prompt": [ASKS, ANSWER], "completion": [ASKS]}, "none of its answers is to be trained on"),
    ({"question": "Q", "answer": 4}, "its answer is not a string"),
    ({"instruction": "Q", "output": "A", "history": ["one", "two"]}, "its history is no list of questions"),
    (
        {"question": "Q", "answer": "A", "system": "S", "system_prompt": "T"},
        "system or system_prompt is not one string",
    ),
    ({"messages": SAID, "images": ["a.png"]}, "it has images, which is not read here"),
    ({"image": "a.png", "conversations": [ASKS, ANSWER]}, "it has image, which"),
    ({"messages": [{**ASKS, "content": [{"type": "image", "text": ""}]}, ANSWER]}, r"part that is no text \(image\)"),
    ({"messages": SAID, "chat_template_kwargs": {"enable_thinking": False}}, "it has chat_template_kwargs, which"),
    ({"messages": ["Q", "A"]}, "does not say whose it is"),
    ({"messages": [{**ASKS, "role": ["user"]}, ANSWER]}, "the unknown role"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "f()"}]}, "is not JSON"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "[3]"}]}, "no function"),
    ({"messages": [ASKS, {**ANSWER, "train_detail": []}]}, "has train_detail, and the loss counts whole answers"),
    ({"messages": [ASKS, {**ANSWER, "weight": 0.5}]}, "a message's weight is not true or false, 0 or 1"),
    ({"messages": [{**ASKS, "train": True}, ANSWER]}, "a user message is to be trained on"),
    ({"segments": []}, "none of its segments has the label true, so it has no answer"),
    ({"segments": None}, "its segments are no list"),
    ({"segments": [SHOWN]}, "none of its segments has the label true"),
    ({"segments": [SHOWN, {"label": True, "text": ""}]}, "its segments with the label true are empty"),
    ({"segments": [SHOWN, "A"]}, "a segment is no object with a label and a text"),
    ({"segments": [SHOWN, {"label": True, "text": None}]}, "a segment's text is not a string"),
    ({"segments": [SHOWN, {"label": "true", "text": "A"}]}, "a segment's label is not true or false"),
    ({"segments": [SHOWN, {"text": "A"}]}, "a segment's label is not true or false"),
    ({"segments": [SHOWN, COUNTED], "tools": [{}]}, "it has tools beside segments; write that into one"),
]


@pytest.mark.parametrize(("record", "words"), LEFT_OUT)
def test_records_that_are_left_out(record: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        conversation_of(record)


def test_segments_are_read_as_they_are() -> None:
    record = {"segments": [SHOWN, {**COUNTED, "id": 3}, {"label": 0, "text": ""}, {"label": 1, "text": " "}], "id": 1}
    assert schema_of(record) == SEGMENTS
    assert conversation_of(record) == Labelled(("Q", "A", "", " "), (False, True, False, True))
    # Both ways round: what is there tells the form, not what the others before it had.
    assert schema_of({"segments": None}, "Alpaca") == schema_of({"question": "Q", "segments": []}, SEGMENTS) == SEGMENTS


def test_what_lacks_something_is_of_the_schema_of_those_before_it() -> None:
    for record, first in (
        ({"question": "Q"}, "question and answer"),
        ({"instruction": "Q"}, "Dolly"),
        ({"completion": "A"}, "prompt and completion as text"),
    ):
        with pytest.raises(NoSchema):
            schema_of(record)
        assert schema_of(record, first) == first
        with pytest.raises(RecordError):
            conversation_of(record, first)
    with pytest.raises(NoSchema):
        schema_of({"question": "Q", "context": "C"}, "question and answer")


def test_a_prompt_of_turns_is_shown_and_not_trained_on() -> None:
    turns = [ASKS, ANSWER, ASKS, ANSWER, ASKS, {**ANSWER, "weight": 0}, ASKS, ANSWER]
    said = conversation_of({"prompt": turns[:3], "completion": turns[3:]})
    assert isinstance(said, Conversation) and said.trained == (False, True, False, True)
    assert schema_of({"prompt": turns[:3], "completion": turns[3:]}) == SPOKEN
    assert conversation_of({"prompt": "", "completion": "A"}) == Completion("", "A")


def test_calls_of_llama_factory_are_calls() -> None:
    spoken = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "A"},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    asked = [ASKS, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}, ANSWER]
    assert conversation_of({"conversations": spoken}) == conversation_of({"messages": asked})


FLAGS = st.sampled_from(["weight", "train", "training", "loss"])


@given(st.lists(st.dictionaries(FLAGS, st.sampled_from([True, False, 0, 1, 1.0, None])), min_size=1, max_size=5))
def test_every_flag_that_is_off_takes_an_answer_out_of_the_loss(flags: list[dict[str, Any]]) -> None:
    messages = [message for each in flags for message in (ASKS, {**ANSWER, **each})]
    wanted = tuple(all(flag is None or flag for flag in each.values()) for each in flags)
    if not any(wanted):
        with pytest.raises(RecordError, match="none of its answers"):
            conversation_of({"messages": messages})
        return
    said = conversation_of({"messages": messages})
    assert isinstance(said, Conversation) and said.trained == wanted
    assert said.messages == [ASKS, ANSWER] * len(flags), "no template sees a flag"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["", "user", "A"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "type", "weight", "label"]), inner
        )
    ),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool", "function_call"]) | JSON},
    optional={"content": JSON, "value": JSON, "train": JSON, "tool_calls": JSON},
)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from([*COLUMNS, "text", "id"]), JSON | st.lists(TURN, max_size=4)))
def test_whatever_a_record_holds_it_is_read_or_refused(record: dict[str, Any]) -> None:
    try:
        said = conversation_of(record)
    except (NoSchema, RecordError) as reason:
        assert str(reason)
        return
    assert schema_of(record) in {*FLAT, *LISTS.values(), SPOKEN, PLAIN, SEGMENTS}
    if isinstance(said, Conversation):
        answers = [message for message in said.messages if message["role"] == "assistant"]
        assert len(answers) == len(said.trained) and any(said.trained)
    elif isinstance(said, Completion):
        assert record["completion"] == said.completion != ""
    else:
        assert len(said.pieces) == len(said.counted) == len(record["segments"])
