"""Records of conversations: messages, ShareGPT and Alpaca (LongAlpaca's too), as JSON lines, one JSON list or a table.

All become lists of messages as chat templates take them. A record that cannot be trained on is a `RecordError`, which
the caller counts; a file that cannot be read, or that mixes schemas, is a `DataError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from pipeline.data.discovery import listed, matched, walk
from pipeline.data.json_list import read_objects
from pipeline.data.kinds import BOM, HEAD, LINES, accepted, ending_of, holds_records
from pipeline.data.packed import opened, packing_of
from pipeline.data.schemas import COLUMNS, LISTS, schema_of
from pipeline.data.tables import CSV, TABLE_ENDINGS, open_table, table_of
from pipeline.reporting.words import counted
from pipeline.storage.lfs import refuse_pointer

_READ = accepted(LINES)
"""What messages name."""
_NOTES = ("dataset_info.json", "dataset_infos.json", "state.json")
"""What `datasets` writes beside its tables."""
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names of who speaks, as roles."""
_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
"""Roles that may follow a role; "" stands for the beginning."""


class RecordError(Exception):
    """A record is left out; the message is the reason, without the place."""


@dataclass(frozen=True)
class Conversation:
    """What one record says."""

    messages: list[dict[str, Any]]
    """As chat templates take them: role, content, and whatever else the record gives."""
    tools: list[Any] | None
    """JSON schemas of the tools offered."""
    trained: tuple[bool, ...]
    """Whether the loss counts each assistant message, in order."""


@dataclass(frozen=True)
class Record:
    """A JSON object or a row, and its place."""

    value: dict[str, Any]
    file: Path
    number: int
    """1-based line of JSON lines and CSV, position in a list, or row."""
    unit: str
    """`line`, `record` or `row`."""

    @property
    def where(self) -> str:
        """Place, for messages."""
        return f"{self.file}: {self.unit} {self.number}"


def conversation_files(path: Path) -> list[Path]:
    """The file, or the JSON files and tables of a folder or pattern (not hidden ones), sorted by relative path.

    Raises:
        DataError: there is none.
    """
    return _divided(path)[0]


def passed_over(path: Path) -> tuple[str, ...]:
    """One sentence that names the files at a path that are not read as conversations, or none.

    Raises:
        DataError: see `conversation_files`.
    """
    others = _divided(path)[1]
    return (f"{path}: {counted(len(others), 'file is', 'files are')} not read: {listed(others)}.",) if others else ()


def _divided(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """`conversation_files`, and the names of the other files there; of `datasets`' own notes nothing is said."""
    if path.is_file():
        return [path], ()
    walked = matched(path)
    if walked is None and not path.is_dir():
        raise DataError(f"{path}: no such file or folder; point it at conversations ({_READ}).")
    found: list[Path] = []
    others: list[str] = []
    for file in sorted(walk(path)) if walked is None else walked:
        # A folder of prepared tokens may lie inside.
        if holds_records(file.name) and file.name not in _NOTES and file.is_file():
            found.append(file)
        elif file.name not in _NOTES:
            others.append(file.name if walked is not None else file.relative_to(path).as_posix())
    if not found:
        there = f" (there are {listed(tuple(others))})" if others else ""
        raise DataError(f"{path}: holds no conversations (no file ending in {_READ}){there}.")
    return found, tuple(others)


def read_records(file: Path) -> Iterator[Record]:
    """The records of one file, all of one schema.

    Raises:
        DataError: it cannot be read, is not JSON, or its records are of several schemas or of none; the message names
            the line.
    """
    first: tuple[str, Record] | None = None
    for record in _objects(file):
        schema = schema_of(record.value)
        if schema is None:
            keys = ", ".join(sorted(record.value)) or "nothing"
            raise DataError(
                f"{record.where} is no conversation (it has {keys}); give it messages, conversations, or instruction "
                "and output."
            )
        if first is None:
            first = schema, record
        elif schema != first[0]:
            raise DataError(
                f"{record.where} is of the schema {schema}, {first[1].unit} {first[1].number} of {first[0]}; split the "
                "file."
            )
        yield record


def _objects(file: Path) -> Iterator[Record]:
    refuse_pointer(file, DataError)
    try:
        with file.open("rb") as raw:
            head = raw.read(HEAD)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); mend or remove it.") from error
    packing = packing_of(head)
    if packing:
        with opened(file, packing) as (_, stream):
            head = stream.read(HEAD)
    table = table_of(head, ending_of(file.name)[0])
    if table:
        if packing and table != CSV:
            raise DataError(f"{file}: is {table} packed as {packing}; unpack it.")
        yield from _rows(file, table, packing)
        return
    if TABLE_ENDINGS.get(ending_of(file.name)[0], CSV) != CSV:
        raise DataError(
            f"{file}: does not begin as the {TABLE_ENDINGS[ending_of(file.name)[0]]} of its name; copy it again."
        )
    with opened(file, packing) as (_, stream):
        if head.removeprefix(BOM).lstrip().startswith(b"["):
            for place, value in read_objects(stream, file):
                yield Record(value, file, place, "record")
            return
        for number, line in enumerate(stream, 1):
            if line.removeprefix(BOM).strip():
                yield _record(_parsed(line, f"{file}: line {number}"), file, number)


def _rows(file: Path, kind: str, packing: str) -> Iterator[Record]:
    with open_table(file, kind, packing) as table:
        if not set(COLUMNS) & set(table.columns):
            raise DataError(
                f"{file}: the table has no column of conversations (it has {', '.join(table.columns)}); give it "
                "messages, conversations, or instruction and output."
            )
        key = next((name for name in ("messages", "conversations", "instruction") if name in table.columns), None)
        for number, row in table.rows(COLUMNS):
            # All rows of a table have all of its columns, so what is missing is empty.
            value = {name: member for name, member in row.items() if member is not None and member != ""}
            for name in ("messages", "conversations"):
                if isinstance(value.get(name), str):  # as CSV holds lists
                    value[name] = _parsed(
                        value[name].encode("utf-8", "surrogatepass"), f"{file}: {table.unit} {number}, {name},"
                    )
            if key is not None and key not in value and schema_of(value) is None:
                # What tells the kind is empty: counted as a record of JSON lines is, in which it is empty too.
                value[key] = "" if key == "instruction" else []
            yield Record(value, file, number, table.unit)


def _record(value: Any, file: Path, number: int) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{file}: line {number} is not a JSON object; mend or remove it.")
    return Record(value, file, number, "line")


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON in UTF-8 ({reason}); mend or remove it.") from error


def conversation_of(record: dict[str, Any]) -> Conversation:
    """The conversation that a record of any known schema holds.

    An assistant message with `train: false` or `weight: 0` is shown to the model and not trained on.

    Raises:
        RecordError: it has no answer, its roles are out of order, or a field is not what the schema says.
    """
    schema = schema_of(record)
    key = next((name for name, of in LISTS.items() if of == schema), None)
    if key is not None and not isinstance(record[key], list):
        raise RecordError(f"its {key} are no list")
    if schema == "Alpaca":
        messages = _alpaca(record)
    elif schema == "ShareGPT":
        messages = [_spoken(turn) for turn in record["conversations"]]
        system = record.get("system")
        if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    else:
        messages = [dict(message) if isinstance(message, dict) else {} for message in record["messages"]]
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
    tools = record.get("tools")
    if isinstance(tools, str):  # as tables hold them
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RecordError("its tools are not JSON") from error
    if tools is not None and not isinstance(tools, list):
        raise RecordError("its tools are not a list")
    return Conversation(messages, tools or None, _checked(messages))


def _plain(name: str, value: Any) -> Any:
    """A field of a message as templates of text models take it: content in parts is one string."""
    if name == "content" and isinstance(value, list) and all(isinstance(part, dict) for part in value):
        # As the templates that take parts write them: one behind the other.
        others = [part.get("type") for part in value if not isinstance(part.get("text"), str)]
        if others:
            raise RecordError(f"a message has a part that is no text ({others[0]})")
        return "".join(part["text"] for part in value)
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


def _alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [record.get(name) or "" for name in ("instruction", "input", "output")]
    if not all(isinstance(part, str) for part in parts):
        raise RecordError("its instruction, input or output is not a string")
    instruction, context, output = parts
    question = f"{instruction}\n\n{context}" if context else instruction
    system = record.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _spoken(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        return {}
    if "role" in turn:
        return dict(turn)
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**rest, "role": _SPEAKERS.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}


def _checked(messages: list[dict[str, Any]]) -> tuple[bool, ...]:
    """Check order and content, take the flags out; whether each assistant message is trained on."""
    trained = []
    before = ""
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _MAY_FOLLOW or role == "":
            raise RecordError(f"a message has the unknown role {role!r}")
        if role not in _MAY_FOLLOW[before]:
            raise RecordError(f"its roles are out of order ({role} {'after ' + before if before else 'first'})")
        if content is not None and not isinstance(content, str):
            raise RecordError("the content of a message is not a string")
        wanted, weight = message.pop("train", True), message.pop("weight", 1)
        if role == "assistant":
            if not (content or "").strip() and not message.get("tool_calls"):
                raise RecordError("an answer is empty")
            if not isinstance(wanted, bool) or weight not in (0, 1):
                raise RecordError("a message's train is not true or false, or its weight not 0 or 1")
            trained.append(wanted and bool(weight))
        elif not isinstance(content, str) or (role == "user" and not content.strip()):
            raise RecordError(f"a {role} message is empty")
        before = str(role)
    if not trained:
        raise RecordError("it has no answer")
    if not any(trained):
        raise RecordError("none of its answers is to be trained on")
    if before != "assistant":
        raise RecordError(f"it ends with a {before} message, not with an answer")
    return tuple(trained)
