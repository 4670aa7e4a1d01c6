"""What a record of a known schema says: a conversation as chat templates take it, or text that none renders.

A record that cannot be trained on is a `RecordError`, which the caller counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.data.schemas import FLAT, LISTS, NOT_READ, PLAIN, SEGMENTS, SPOKEN, SYSTEMS, Flat, schema_of

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names of who speaks, as roles."""
_MAY_FOLLOW = {
    "": ("system", "developer", "user"),
    "system": ("developer", "user"),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
"""Roles that may follow a role; "" stands for the beginning."""
_FLAGS = ("weight", "train", "training", "loss")
"""Names under which a message says whether the loss counts it: OpenAI's, two that Axolotl is told of, ms-swift's."""
_FINER = ("train_detail", "training_detail", "loss_scale")
"""Names under which one says it of parts of itself, or of how much."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of the parts of a message's content that are text."""


_OF_LOSS = frozenset({*_FLAGS, *_FINER})


class RecordError(Exception):
    """A record is left out; the message is the reason, without the place."""


@dataclass(frozen=True)
class Conversation:
    """What one record says."""

    messages: list[dict[str, Any]]
    """As chat templates take them: role, content, and whatever else the record gives. Content is text, or a list of
    parts of text: some templates treat those otherwise than one text (see `rendering`)."""
    tools: list[Any] | None
    """JSON schemas of the tools offered."""
    trained: tuple[bool, ...]
    """Whether the loss counts each assistant message, in order."""


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on, which no template renders."""

    prompt: str
    completion: str
    """What the loss counts, with the end of text behind it."""


@dataclass(frozen=True)
class Labelled:
    """Text in pieces that are tokenized one by one, which no template renders and nothing is put around."""

    pieces: tuple[str, ...]
    counted: tuple[bool, ...]
    """Whether the loss counts each piece."""


Said = Conversation | Completion | Labelled
"""What one record says, in any of these forms."""


def text_in(content: Any) -> str:
    """The text of a message's content."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def conversation_of(record: dict[str, Any], schema: str | None = None) -> Said:
    """What a record says.

    An assistant message with `weight: 0`, `train: false` or the like (`_FLAGS`) is shown to the model, not trained on.

    Args:
        schema: see `schema_of`; None: that of the record alone.

    Raises:
        RecordError: it has no answer, its roles are out of order, or a field is not what the schema says.
        NoSchema: see `schema_of`.
    """
    schema = schema or schema_of(record)
    held = next((name for name in NOT_READ if record.get(name)), None)
    if held is not None:
        raise RecordError(f"it has {held}, which is not read here")
    if schema == PLAIN:
        return _completion(record)
    if schema == SEGMENTS:
        return _labelled(record)
    messages = _flat(record, FLAT[schema]) if schema in FLAT else _listed(record, schema)
    system = _system(record)
    if system and not (messages and messages[0].get("role") in ("system", "developer")):
        messages.insert(0, {"role": "system", "content": system})
    # Templates print None where they take a missing field well; transformers drops it too.
    messages = [
        {
            name: value if type(value) is str else _plain(name, value)
            for name, value in message.items()
            if type(value) is str
            or (value is not None and (name, value) != ("tool_calls", []))  # as tables have it where there is none
        }
        for message in messages
    ]
    return Conversation(messages, _tools(record), _checked(messages))


def _completion(record: dict[str, Any]) -> Completion:
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, str):
        raise RecordError("its prompt is missing")
    if not isinstance(completion, str) or not completion.strip():
        raise RecordError("an answer is empty")
    _refuse_beside(record, "a prompt of plain text; write that into the prompt")
    return Completion(prompt, completion)


def _refuse_beside(record: dict[str, Any], what: str) -> None:
    beside = next((name for name in (*SYSTEMS, "tools", "history") if record.get(name)), None)
    if beside is not None:
        raise RecordError(f"it has {beside} beside {what}")


def _labelled(record: dict[str, Any]) -> Labelled:
    segments = record.get(SEGMENTS)
    if not isinstance(segments, list):
        raise RecordError("its segments are no list")
    for segment in segments:
        if not isinstance(segment, dict):
            raise RecordError("a segment is no object with a label and a text")
        if not isinstance(segment.get("text"), str):
            raise RecordError("a segment's text is not a string")
        if segment.get("label") not in (0, 1):
            raise RecordError("a segment's label is not true or false")
    _refuse_beside(record, "segments; write that into one")
    said = Labelled(tuple(each["text"] for each in segments), tuple(bool(each["label"]) for each in segments))
    if not any(said.counted):
        raise RecordError("none of its segments has the label true, so it has no answer")
    if not any(text and counted for text, counted in zip(said.pieces, said.counted, strict=True)):
        raise RecordError("its segments with the label true are empty")
    return said


def _listed(record: dict[str, Any], schema: str) -> list[dict[str, Any]]:
    """Messages of a schema that has them as lists."""
    if schema == SPOKEN:
        prompt, completion = record.get("prompt"), record.get("completion")
        if not (isinstance(prompt, list) and isinstance(completion, list) and completion):
            raise RecordError("its prompt or completion is missing")
        return [{**_turn(turn), "train": False} for turn in prompt] + [_turn(turn) for turn in completion]
    key = next(name for name, of in LISTS.items() if of == schema)
    if not isinstance(record.get(key), list):
        raise RecordError(f"its {key} are no list")
    return [_turn(turn) for turn in record[key]]


def _turn(turn: Any) -> dict[str, Any]:
    """A turn as a message, ShareGPT's names of its fields and of who speaks as roles."""
    if not isinstance(turn, dict):
        return {}
    message = {name: value for name, value in turn.items() if name not in ("from", "value")}
    role = message.get("role", turn.get("from"))
    message["role"] = _ROLES.get(role, role) if isinstance(role, str) else role
    if role == "function_call":
        message["tool_calls"] = _calls(turn.get("value"))
    elif message.get("content") is None and "value" in turn:
        message["content"] = turn["value"]
    return message


def _calls(text: Any) -> list[dict[str, Any]]:
    """The tool calls that a turn of LLaMA-Factory's ShareGPT is: the JSON of one, or of a list of them."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError("a function_call is not JSON") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RecordError("a function_call names no function")
    return [{"type": "function", "function": call} for call in calls]


def _flat(record: dict[str, Any], flat: Flat) -> list[dict[str, Any]]:
    texts = {name: record.get(name) or "" for name in (flat.question, *flat.contexts, flat.answer)}
    strange = next((name for name, text in texts.items() if not isinstance(text, str)), None)
    if strange is not None:
        raise RecordError(f"its {strange} is not a string")
    pairs = record.get("history") or []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise RecordError("its history is no list of questions with their answers")
    *question, answer = texts.values()
    return [
        {"role": role, "content": content}
        for pair in (*pairs, ("\n\n".join(filter(None, question)), answer))
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _system(record: dict[str, Any]) -> str | None:
    given = [record[name] for name in SYSTEMS if record.get(name)]
    if len(given) > 1 or not all(isinstance(text, str) for text in given):
        raise RecordError(f"its {' or '.join(SYSTEMS)} is not one string")
    return given[0] if given else None


def _tools(record: dict[str, Any]) -> list[Any] | None:
    tools = record.get("tools") or None
    if isinstance(tools, str):  # as tables hold them
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RecordError("its tools are not JSON") from error
    if tools is not None and not isinstance(tools, list):
        raise RecordError("its tools are not a list")
    return tools or None


def _plain(name: str, value: Any) -> Any:
    """A field of a message as templates of text models take it."""
    if name == "content" and isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
                raise RecordError(f"a message has a part that is no text ({part.get('type')})")
        return [{"type": "text", "text": part["text"]} for part in value]
    if name == "tool_calls" and isinstance(value, list):
        return [_with_arguments(call, _as_object) for call in value]
    return value


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """A tool call, or the function in it, with its arguments changed."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    """As an object, which transformers' templates expect; OpenAI's are a string."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def with_joined_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with content in parts as one text."""
    return [
        {**message, "content": text_in(message["content"])} if isinstance(message.get("content"), list) else message
        for message in messages
    ]


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the arguments of tool calls as JSON text, which a template may put behind other text."""

    def as_text(arguments: Any) -> Any:
        return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments

    return [
        {**message, "tool_calls": [_with_arguments(call, as_text) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _checked(messages: list[dict[str, Any]]) -> tuple[bool, ...]:
    """Check order and content, take the flags out; whether each assistant message is trained on."""
    trained = []
    before = ""
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role is None:
            raise RecordError("a message does not say whose it is (role, or from)")
        if not isinstance(role, str) or role not in _MAY_FOLLOW or role == "":
            known = role.strip().lower() if isinstance(role, str) else ""
            meant = _ROLES.get(known, known)
            mend = f" (write {meant})" if meant and meant in _MAY_FOLLOW else ""
            raise RecordError(f"a message has the unknown role {role!r}{mend}")
        if role not in _MAY_FOLLOW[before]:
            raise RecordError(f"its roles are out of order ({role} {'after ' + before if before else 'first'})")
        if not (content is None or isinstance(content, str) or _is_parts(content)):
            raise RecordError("the content of a message is not a string")
        counted = _flag(message)
        older = message.get("function_call")
        # One without any value is how tables write that there is none.
        if isinstance(older, dict) and any(value is not None for value in older.values()):
            raise RecordError("a message has a function_call, OpenAI's older form; write it as tool_calls")
        if role == "assistant":
            if not text_in(content).strip() and not message.get("tool_calls"):
                raise RecordError("an answer is empty")
            trained.append(counted is not False)
        elif counted:
            raise RecordError(f"a {role} message is to be trained on, and the loss counts only what the assistant says")
        elif content is None or (role == "user" and not text_in(content).strip()):
            raise RecordError(f"a {role} message is empty")
        before = role
    if not trained:
        raise RecordError("it has no answer")
    if not any(trained):
        raise RecordError("none of its answers is to be trained on")
    if before != "assistant":
        raise RecordError(f"it ends with a {before} message, not with an answer")
    return tuple(trained)


def _is_parts(content: Any) -> bool:
    """Whether content is what `_plain` makes of parts."""
    return isinstance(content, list) and all(isinstance(part, dict) for part in content)


def _flag(message: dict[str, Any]) -> bool | None:
    """Take out what a message says of the loss: whether it is counted; None: nothing."""
    if _OF_LOSS.isdisjoint(message):
        return None
    finer = next((name for name in _FINER if name in message), None)
    if finer is not None:
        raise RecordError(f"a message has {finer}, and the loss counts whole answers or none of them")
    flags = {name: message.pop(name) for name in _FLAGS if name in message}
    strange = next((name for name, flag in flags.items() if flag not in (0, 1)), None)
    if strange is not None:
        raise RecordError(f"a message's {strange} is not true or false, 0 or 1")
    return all(flags.values()) if flags else None
