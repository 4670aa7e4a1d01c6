"""Which of the known forms of conversations a record has, and what is wrong with one of another form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

LISTS = {"messages": "messages", "conversations": "ShareGPT"}
"""Schemas whose turns are one list, by its key."""
PAIR = ("prompt", "completion")
PLAIN, SPOKEN = "prompt and completion as text", "prompt and completion as messages"
"""TRL's pairs, by the form of both."""
SEGMENTS = "segments"
"""Axolotl's pieces of text with their labels: the key, and the schema."""
CONTEXTS = ("input", "context")
"""What may stand behind an instruction, one of them."""
SYSTEMS = ("system", "system_prompt")
NOT_READ = ("image", "images", "video", "videos", "audio", "audios", "chat_template_kwargs")
"""Keys that are not read, and without which a record says something else."""


@dataclass(frozen=True)
class Flat:
    """A schema of one question and its answer, each in a field of its own."""

    question: str
    answer: str
    contexts: tuple[str, ...] = ()
    """One of them may hold text that stands behind the question."""

    @property
    def names(self) -> set[str]:
        """All of its fields."""
        return {self.question, self.answer, *self.contexts}


FLAT = {
    "Alpaca": Flat("instruction", "output", CONTEXTS),
    "Dolly": Flat("instruction", "response", CONTEXTS),
    "question and answer": Flat("question", "answer"),
    "question and response": Flat("question", "response"),
    "query and response": Flat("query", "response"),
    "input and output": Flat("input", "output"),
}
_FIELDS = {name for flat in FLAT.values() for name in flat.names}
READ = (*LISTS, *PAIR, SEGMENTS, *sorted(_FIELDS), *SYSTEMS, "tools", "history")
"""Every key of a record that is read, at its top."""
_OF_OTHERS = frozenset({"chosen", "rejected", "label", "kto_tag"})
COLUMNS = (*READ, *sorted(_OF_OTHERS), *NOT_READ)
"""These, and those that tell that a record is of another kind."""


class NoSchema(Exception):
    """A record has none of the known forms; the message goes on from its place."""


def schema_of(record: dict[str, Any], first: str | None = None) -> str:
    """The schema of a record: a value of `LISTS`, a key of `FLAT`, `PLAIN`, `SPOKEN` or `SEGMENTS`.

    Args:
        first: schema of the records before it; one that only lacks something of it is of that schema too.

    Raises:
        NoSchema: it has none, or is of a kind that supervised fine-tuning does not take.
    """
    if not _OF_OTHERS.isdisjoint(record):
        _refuse_preferences(record, _filled(record))
    for key, schema in LISTS.items():
        if isinstance(record.get(key), list):
            return schema
    pair = [record[name] for name in PAIR if name in record]
    if len(pair) == 2 and pair != [None, None]:
        return _pair(*pair)
    held = _filled(record) & _FIELDS
    whole = {name: flat for name, flat in FLAT.items() if flat.question in record and flat.answer in record}
    for name, flat in whole.items():
        if held <= flat.names and len(held & set(flat.contexts)) < 2:
            return name
    if isinstance(record.get(SEGMENTS), list):
        return SEGMENTS
    if first in FLAT and held and held <= FLAT[first].names:
        return first
    if first in (PLAIN, SPOKEN) and pair:
        return first
    for key, schema in {**LISTS, SEGMENTS: SEGMENTS}.items():
        # Though there is nothing in it, or something else: a record that is left out and counted.
        if key in record:
            return schema
    _refuse(record, held if whole else set())


def _filled(record: dict[str, Any]) -> set[str]:
    return {name for name in COLUMNS if record.get(name) not in (None, "", [])}


def is_conversation(record: dict[str, Any]) -> bool:
    """Whether a record has one of the known forms."""
    try:
        schema_of(record)
    except NoSchema:
        return False
    return True


def _refuse_preferences(record: dict[str, Any], filled: set[str]) -> None:
    """Raise for what preferences are learnt from; among it are answers that nobody wants."""
    if {"chosen", "rejected"} <= filled and "messages" not in filled:
        how = "keep what is chosen as the answer, and leave out what is rejected"
        if isinstance(record.get("prompt"), type(record["chosen"])):
            how = "to train on the chosen answers, give --columns prompt=prompt,completion=chosen"
        elif isinstance(record["chosen"], list):
            how = "to train on the chosen conversations, give --columns messages=chosen"
        raise NoSchema(
            f"is a pair of preferences (chosen and rejected), which supervised fine-tuning does not take; {how}"
        )
    labelled = isinstance(record.get("label"), bool) or ("label" in filled and "completion" in record)
    if labelled or "kto_tag" in filled:
        name = "label" if labelled else "kto_tag"
        raise NoSchema(
            f"is an answer with a verdict on it (as for KTO), which supervised fine-tuning does not take; keep those "
            f"whose {name} is true, without the {name}"
        )


def _pair(*parts: Any) -> str:
    """Schema of a prompt and a completion, one of which may be missing."""
    forms = {_form(part) for part in parts if part is not None} or {"text"}
    if len(forms) > 1 or not forms <= {"text", "messages"}:
        prompt, completion = map(_form, parts)
        raise NoSchema(
            f"has a prompt that is {prompt} and a completion that is {completion}; give both as text, or both as lists "
            "of messages"
        )
    return PLAIN if forms == {"text"} else SPOKEN


def _form(part: Any) -> str:
    if isinstance(part, str):
        return "text"
    return "messages" if isinstance(part, list) else "neither text nor messages"


def _refuse(record: dict[str, Any], unclear: set[str]) -> NoReturn:
    """Raise for a record that has none of the forms.

    Args:
        unclear: its fields of more than one of them.
    """
    if unclear:
        raise NoSchema(
            f"has {', '.join(sorted(unclear))}, and it is not known what stands where; say it with --columns, such as "
            "instruction=question,input=context,output=answer"
        )
    keys = ", ".join(sorted(record)) or "nothing"
    if "prompt" in record:
        how = "instruction=prompt,output=KEY (through the chat template) or prompt=prompt,completion=KEY (as it is)"
        raise NoSchema(f"has a prompt and no completion (it has {keys}); name the answer with --columns {how}")
    text = "prepare text without --chat, or " if "text" in record else ""
    raise NoSchema(
        f"is no conversation (it has {keys}); {text}say what stands where with --columns, such as messages=KEY or "
        "instruction=KEY,output=KEY"
    )
