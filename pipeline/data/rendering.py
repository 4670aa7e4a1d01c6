"""Conversations to text through a chat template, and where in it the answers stand.

The template is transformers' own, compiled for its sandbox, and given the variables that transformers gives it. Answers
are found by its {% generation %} marks, or where it has none by comparing what it renders of the conversation's
beginnings.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Template, meta, nodes

from parallel.errors import DataError
from pipeline.data.conversations import Conversation, RecordError, text_in, with_joined_parts, with_text_arguments
from pipeline.data.turns import STUMBLES, turns_of

Rendered = tuple[str, list[tuple[int, int]]]
"""The text, and from where to where its trained answers stand, in characters."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SCALARS = frozenset({str, int, float, bool, type(None)})
_NO_CALLS = "the chat template does not show its tool calls (give one that knows tools with --chat-template)"
_GIVE = "give one that does with --chat-template"
_NO_DEVELOPER = f"the chat template knows no role developer (name it system, or {_GIVE})"
REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})
"""Fields of a message that transformers gives the template under other names too."""


def _plain(value: Any) -> bool:
    """Whether a value is JSON of Python's own types, which transformers hands on as it is."""
    kind = type(value)
    if kind is dict:
        return all(type(name) is str and _plain(member) for name, member in value.items())
    return kind in _SCALARS or (kind is list and all(map(_plain, value)))


def _as_given(messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
    """Whether transformers gives a template just these messages and tools: copies, since its sandbox changes none."""
    for message in messages:
        for name, value in message.items():
            if name in REASONING or not (type(value) is str or _plain(value)):
                return False
    return tools is None or (_plain(tools) and all(type(tool) is dict for tool in tools))


class Renderer:
    """A chat template, compiled.

    Args:
        source: the template's text.
        names: content of the special tokens by the names that templates know them by.
        place: where the template is from, for messages.

    Attributes:
        reads_tools: it reads the definitions of tools; one that does not cannot show them.
        reads_reasoning: the same of the reasoning that stands beside an answer.

    Raises:
        jinja2.TemplateError: it is no valid Jinja.
    """

    def __init__(self, source: str, names: dict[str, str], place: Path) -> None:
        # Seconds of import that only chat needs.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._source, self._names, self._place = source, names, place
        self._compiled = _compile_jinja_template(source)
        self._marked = bool(_MARKS.search(source))
        self._given = {**self._compiled.globals, "documents": None, **names}
        environment = self._compiled.environment
        tree = environment.parse(source)
        self.reads_tools = "tools" in meta.find_undeclared_variables(tree)
        self._reads_calls = _names(tree, "tool_calls")
        self.reads_reasoning = any(_names(tree, field) for field in REASONING)
        self._turns = None if self._marked else turns_of(environment, source, self._given, frozenset(names))
        self._takes_parts = self._probe_parts()

    def _probe_parts(self) -> bool:
        """Whether it renders content in parts of text as text; others fail, or write down the list."""
        parts = [{"type": "text", "text": "left"}, {"type": "text", "text": "right"}]
        try:
            given, joined = (
                self._direct(self._compiled, [{"role": "user", "content": content}], None, False)
                for content in (parts, "leftright")
            )
        except RecordError:
            return False
        return given == joined and "leftright" in joined

    def rendered(self, conversation: Conversation) -> Rendered:
        """What is to be tokenized.

        Raises:
            RecordError: the template refuses the conversation.
            DataError: the template has no marks, and renders the beginning of a conversation otherwise than the whole.
        """
        conversation = self._as_taken(conversation)
        try:
            return self._in_either_form(conversation)
        except RecordError:
            if self._may_hide_calls(conversation):
                raise RecordError(_NO_CALLS) from None
            as_system = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in conversation.messages
            ]
            if as_system == conversation.messages:
                raise
            self._in_either_form(replace(conversation, messages=as_system))  # or it is refused for another reason
            raise RecordError(_NO_DEVELOPER) from None

    def check_shown(self, conversation: Conversation, text: str) -> None:
        """Return if the template left nothing out that the answers go by.

        Args:
            text: what it made of the conversation.

        Raises:
            RecordError: the text would be the same without a message, or without the tool calls. Of an answer that is a
                call nothing but its end would then be trained on.
        """
        conversation = self._as_taken(conversation)
        messages = conversation.messages
        if self._may_hide_calls(conversation):
            silent = [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]
            if self._rendered(silent, conversation)[0] == text:
                raise RecordError(_NO_CALLS)
        for place, message in enumerate(messages):
            said = text_in(message.get("content")).strip()
            # Nearly all text stands there as it is; some is written down as JSON, say.
            if message["role"] != "assistant" and said not in text and self._hides(conversation, place, text):
                if message["role"] == "developer":
                    raise RecordError(_NO_DEVELOPER)
                raise RecordError(f"the chat template does not show its {message['role']} message ({_GIVE})")

    def _may_hide_calls(self, conversation: Conversation) -> bool:
        """Whether there are tool calls, and the template does not name their field; it may write whole messages."""
        return not self._reads_calls and any(message.get("tool_calls") for message in conversation.messages)

    def _hides(self, conversation: Conversation, place: int, text: str) -> bool:
        """Whether the text is the same if a message says something else."""
        messages = list(conversation.messages)
        messages[place] = {**messages[place], "content": secrets.token_hex(16)}
        try:
            return self._in_either_form(replace(conversation, messages=messages))[0] == text
        except (RecordError, DataError):
            return False  # what is said there matters

    def _as_taken(self, conversation: Conversation) -> Conversation:
        """The conversation with content in parts only for a template that takes such."""
        if self._takes_parts or not any(type(message.get("content")) is list for message in conversation.messages):
            return conversation
        return replace(conversation, messages=with_joined_parts(conversation.messages))

    def _in_either_form(self, conversation: Conversation) -> Rendered:
        """What is rendered with the arguments of calls as objects, or else as text."""
        try:
            return self._rendered(conversation.messages, conversation)
        except RecordError:
            messages = with_text_arguments(conversation.messages)
            if messages == conversation.messages:
                raise
            return self._rendered(messages, conversation)

    def _rendered(self, messages: list[dict[str, Any]], conversation: Conversation) -> Rendered:
        tools, trained = conversation.tools, conversation.trained
        given = _as_given(messages, tools)
        if self._marked:
            text, spans = self._render(messages, tools, False, given)
            if not all(trained) and len(spans) != len(trained):
                raise RecordError("the template marks another number of answers than it has, so one cannot be left out")
            kept = spans if all(trained) else [span for span, wanted in zip(spans, trained, strict=True) if wanted]
            return text, [(int(start), int(stop)) for start, stop in kept]
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        found = None
        if self._turns is not None and given:
            whole = self._direct(self._turns.template, messages, tools, False)
            found = self._turns.answers(whole, len(messages), answers)
        text, spans = found or self._compared(messages, tools, answers, given)
        return text, [span for span, wanted in zip(spans, trained, strict=True) if wanted]

    def _compared(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, answers: list[int], given: bool
    ) -> Rendered:
        text, _ = self._render(messages, tools, False, given)
        spans = []
        for place in answers:
            before, _ = self._render(messages[:place], tools, True, given)
            last = place == len(messages) - 1  # most conversations' only answer: what was rendered above
            until = text if last else self._render(messages[: place + 1], tools, False, given)[0]
            if not (until.startswith(before) and text.startswith(until)):
                raise DataError(
                    f"{self._place}: its chat template has no {{% generation %}} marks, and does not render "
                    "the beginning of a conversation as it stands in the whole, so answers cannot be told; give a "
                    "template with marks."
                )
            spans.append((len(before), len(until)))
        return text, spans

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, given: bool) -> Rendered:
        """Text, and what the marks enclose."""
        if given and not self._marked:
            return self._direct(self._compiled, messages, tools, prompt), []
        if given:
            blocks: list[str] = []
            spans: list[tuple[int, int]] = []
            with self._compiled.environment.activate_tracker(blocks, spans):
                return self._direct(self._compiled, messages, tools, prompt, blocks), spans
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, all_spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._source,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self._names,
            )
        except STUMBLES as error:
            raise _refusal(error) from error
        return texts[0], (all_spans[0] if self._marked else [])

    def _direct(
        self,
        template: Template,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        prompt: bool,
        blocks: list[str] | None = None,
    ) -> str:
        """What `render_jinja_template` makes of messages that it gives the template as they are.

        Args:
            blocks: filled with the pieces while the template writes them.
        """
        variables = {**self._given, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        context = template.new_context(variables, shared=True)
        pieces = [] if blocks is None else blocks
        try:
            pieces.extend(template.root_render_func(context))
        except STUMBLES as error:
            raise _refusal(error) from error
        return "".join(pieces)


def _names(tree: nodes.Template, field: str) -> bool:
    """Whether a template names a field of a message."""
    attributes = (node.attr for node in tree.find_all(nodes.Getattr))
    return field in attributes or any(node.value == field for node in tree.find_all(nodes.Const))


def _refusal(error: Exception) -> RecordError:
    return RecordError(f"the chat template refuses it ({' '.join(str(error).split())[:120]})")
