"""Conversations to token ids through a chat template, and which of them the loss counts.

The template is rendered by transformers' own (sandboxed) renderer and the text tokenized by the folder's
tokenizer.json, where, unlike in plain text, special tokens are tokens. Answers are found by the template's
{% generation %} marks, or where it has none by comparing what it renders of the conversation's beginnings.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.conversations import Conversation, RecordError, with_text_arguments
from pipeline.data.tokenizer import HfTokenizer, TextTokenizer
from pipeline.data.tokenizer_files import read_json

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_KEPT = 64
"""Tokens that a truncated stretch keeps at each end: the question stands at one of them, and headers of the message."""
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class Sample:
    """One conversation of T tokens."""

    tokens: NDArray[np.uint32]
    """[T]."""
    scored: NDArray[np.bool_]
    """Whether the loss counts the token (as a target), [T]."""
    cut: int = 0
    """Tokens that truncation took out."""


class ChatTemplate:
    """A chat template with the tokenizer it is for.

    Args:
        tokenizer: of a folder with tokenizer.json.
        file: a Jinja file to use instead of the folder's template.

    Attributes:
        source: the template's text.
        encoder: of the library, which makes tokens of special ones.
        special: id by content of the tokenizer's special tokens.
        identity: sha256 (hex) of what decides tokens and masks beyond the tokenizer's own identity.

    Raises:
        DataError: there is no template, it is no valid Jinja, or the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: TextTokenizer, file: Path | None = None) -> None:
        # Seconds of import that only chat needs.
        from jinja2 import TemplateError
        from tokenizers import Tokenizer
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if not isinstance(tokenizer, HfTokenizer):
            raise DataError(
                f"{tokenizer.path}: a chat template needs a folder with tokenizer.json; save the tokenizer with "
                "transformers once."
            )
        self.tokenizer = tokenizer
        config_file = tokenizer.path / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        self.source = _template(tokenizer.path, config, file)
        try:
            _compile_jinja_template(self.source)
        except TemplateError as error:
            raise DataError(f"{file or tokenizer.path}: its chat template is no valid Jinja ({error}).") from error
        self.marked = bool(_MARKS.search(self.source))
        self.encoder = Tokenizer.from_str(json.dumps({**tokenizer.settings, "truncation": None, "padding": None}))
        self.special = {
            token.content: number for number, token in self.encoder.get_added_tokens_decoder().items() if token.special
        }
        self._special_ids = np.array(sorted(self.special.values()), dtype=np.uint32)
        self._names = {f"{role}_token": _content(config.get(f"{role}_token")) for role in _ROLES}
        self._names = {name: content for name, content in self._names.items() if content is not None}
        settings = json.dumps(["chat 1", self.source, self._names, sorted(self.special.items())])
        self.identity = hashlib.sha256(settings.encode()).hexdigest()

    def holds_special(self, conversation: Conversation) -> str | None:
        """A special token whose spelling stands in a message, where it becomes that token; None: there is none."""
        for message in conversation.messages:
            for content in self.special:
                if content in (message.get("content") or ""):
                    return content
        return None

    def sample(self, conversation: Conversation) -> Sample:
        """Tokens and mask of a whole conversation.

        Raises:
            RecordError: the template refuses the conversation, or nothing of it would be scored.
            DataError: the template has no marks, and renders the beginning of a conversation otherwise than the whole.
        """
        try:
            text, spans = self._rendered(conversation)
        except RecordError:
            messages = with_text_arguments(conversation.messages)
            if messages == conversation.messages:
                raise
            text, spans = self._rendered(replace(conversation, messages=messages))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError("it escapes half a surrogate pair") from error
        encoding = self.encoder.encode(text, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=np.uint32)
        scored = np.zeros(tokens.size, np.bool_)
        for start, stop in spans:
            # As transformers: through the first token of the last character. Characters that a normalizer drops have
            # none; transformers gives up on the rest of the conversation there, we look further inside the answer.
            held = (encoding.char_to_token(place) for place in range(start, stop))
            first = next((token for token in held if token is not None), None)
            held = (encoding.char_to_token(place) for place in range(stop - 1, start - 1, -1))
            last = next((token for token in held if token is not None), None)
            if first is not None and last is not None:
                scored[first : last + 1] = True
        if not scored[1:].any():
            raise RecordError("the template shows none of its answers")
        return Sample(tokens, scored)

    def text_of(self, conversation: Conversation) -> str:
        """What is tokenized.

        Raises:
            RecordError, DataError: see `sample`.
        """
        return self._rendered(conversation)[0]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        return str(self.encoder.decode(ids, skip_special_tokens=False))

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, marks: bool) -> Any:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._names,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # A template stumbles over fields of a record in any of these ways.
            raise RecordError(f"the chat template refuses it ({' '.join(str(error).split())[:120]})") from error
        return texts[0], (spans[0] if marks else [])

    def _rendered(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where its trained answers stand, in characters."""
        messages, tools, trained = conversation.messages, conversation.tools, conversation.trained
        if self.marked:
            text, spans = self._render(messages, tools, False, True)
            if not all(trained) and len(spans) != len(trained):
                raise RecordError("the template marks another number of answers than it has, so one cannot be left out")
            kept = spans if all(trained) else [span for span, wanted in zip(spans, trained, strict=True) if wanted]
            return text, [(int(start), int(stop)) for start, stop in kept]
        text, _ = self._render(messages, tools, False, False)
        spans = []
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        for place, wanted in zip(answers, trained, strict=True):
            before, _ = self._render(messages[:place], tools, True, False)
            last = place == len(messages) - 1  # most conversations' only answer: what was rendered above
            until = text if last else self._render(messages[: place + 1], tools, False, False)[0]
            if not (until.startswith(before) and text.startswith(until)):
                raise DataError(
                    f"{self.tokenizer.path}: its chat template has no {{% generation %}} marks, and does not render "
                    "the beginning of a conversation as it stands in the whole, so answers cannot be told; give a "
                    "template with marks."
                )
            if wanted:
                spans.append((len(before), len(until)))
        return text, spans

    def truncated(self, sample: Sample, limit: int) -> Sample:
        """The sample in no more than `limit` tokens: the middle of its longest stretch without answers goes.

        Neither answers nor special tokens are taken, and `_KEPT` tokens stay at each end of the stretch.

        Raises:
            RecordError: that is not enough.
        """
        excess = sample.tokens.size - limit
        if excess <= 0:
            return sample
        free = ~sample.scored & ~np.isin(sample.tokens, self._special_ids)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False])).astype(np.int8)))
        starts, stops = edges[::2], edges[1::2]
        longest = int(np.argmax(stops - starts)) if starts.size else -1
        if longest < 0 or stops[longest] - starts[longest] < excess + 2 * _KEPT:
            raise RecordError(f"it does not fit {limit} tokens without losing question or answer")
        first = int(starts[longest] + (stops[longest] - starts[longest] - excess) // 2)
        keep = np.r_[0:first, first + excess : sample.tokens.size]
        return Sample(sample.tokens[keep], sample.scored[keep], excess)


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _template(folder: Path, config: dict[str, Any], file: Path | None) -> str:
    own = folder / "chat_template.jinja"
    found = file or (own if own.is_file() else None)
    if found is not None:
        try:
            return found.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{found}: the chat template cannot be read ({error}).") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise DataError(f"{folder}: has no chat template (a base model?); give one with --chat-template FILE.")
    return template
