"""Conversations to token ids through a chat template, and which of them the loss counts.

The text that the template renders (see `rendering`) is tokenized by the folder's tokenizer.json, where, unlike in plain
text, special tokens are tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.conversations import Conversation, RecordError
from pipeline.data.rendering import Rendered, Renderer
from pipeline.data.segments import SEGMENT
from pipeline.data.tokenizer import HfTokenizer, TextTokenizer
from pipeline.data.tokenizer_files import read_json

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
        file: as given.
        encoder: of the library, which makes tokens of special ones.
        special: id by content of the tokenizer's special tokens.
        identity: sha256 (hex) of what decides tokens and masks beyond the tokenizer's own identity.

    Raises:
        DataError: there is no template, it is no valid Jinja, or the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: TextTokenizer, file: Path | None = None) -> None:
        from tokenizers import Tokenizer

        if not isinstance(tokenizer, HfTokenizer):
            raise DataError(
                f"{tokenizer.path}: a chat template needs a folder with tokenizer.json; save the tokenizer with "
                "transformers once."
            )
        self.tokenizer = tokenizer
        config_file = tokenizer.path / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        self.source = _template(tokenizer.path, config, file)
        self.file = file
        self.encoder = Tokenizer.from_str(json.dumps({**tokenizer.settings, "truncation": None, "padding": None}))
        self.special = {
            token.content: number for number, token in self.encoder.get_added_tokens_decoder().items() if token.special
        }
        self._beginnings = {content[:2] for content in self.special}
        self._special_ids = np.array(sorted(self.special.values()), dtype=np.uint32)
        names = {f"{role}_token": _content(config.get(f"{role}_token")) for role in _ROLES}
        self._names = {name: content for name, content in names.items() if content is not None}
        try:
            self._renderer = Renderer(self.source, self._names, tokenizer.path)
        except TemplateError as error:
            raise DataError(f"{file or tokenizer.path}: its chat template is no valid Jinja ({error}).") from error
        # What an earlier release made of hidden calls is made anew.
        strict = [] if self._renderer.reads_calls else ["calls are shown"]
        settings = json.dumps(["chat 1", self.source, self._names, sorted(self.special.items()), *strict])
        self.identity = hashlib.sha256(settings.encode()).hexdigest()

    def holds_special(self, conversation: Conversation) -> str | None:
        """A special token whose spelling stands in a message, where it becomes that token; None: there is none."""
        contents = [message.get("content") or "" for message in conversation.messages]
        # Hundreds of tokens begin alike: nearly all conversations are done with after a look for those beginnings.
        together = "".join(contents)
        if any(beginning in together for beginning in self._beginnings):
            for text in contents:
                for content in self.special:
                    if content in text:
                        return content
        return None

    def hides_tools(self, conversation: Conversation) -> bool:
        """Whether the conversation offers tools whose definitions the template does not show."""
        return conversation.tools is not None and not self._renderer.reads_tools

    def sample(self, conversation: Conversation) -> Sample:
        """Tokens and mask of a whole conversation.

        Raises:
            RecordError: the template refuses the conversation or leaves out its tool calls, or nothing of it would be
                scored.
            DataError: the template has no marks, and renders the beginning of a conversation otherwise than the whole.
        """
        (found,) = self.samples([conversation])
        if isinstance(found, Sample):
            return found
        raise found

    def samples(self, conversations: Sequence[Conversation]) -> Iterator[Sample | RecordError | DataError]:
        """Those of several, in order, which costs less than one by one; what `sample` raises stands in their places.

        They are tokenized in groups of no more than some `SEGMENT` characters.
        """
        group: list[Rendered | RecordError | DataError] = []
        characters = 0
        for conversation in conversations:
            found = self._rendered(conversation)
            group.append(found)
            characters += 0 if isinstance(found, Exception) else len(found[0])
            if characters >= SEGMENT:
                yield from self._tokenized(group)
                group, characters = [], 0
        yield from self._tokenized(group)

    def _rendered(self, conversation: Conversation) -> Rendered | RecordError | DataError:
        try:
            text, spans = self._renderer.rendered(conversation)
            if self._renderer.hides_calls(conversation, text):
                raise RecordError(
                    "the chat template does not show its tool calls (give one that knows tools with --chat-template)"
                )
            text.encode("utf-8")
        except (RecordError, DataError) as error:
            return error
        except UnicodeEncodeError as error:
            refusal = RecordError("it escapes half a surrogate pair")
            refusal.__cause__ = error
            return refusal
        return text, spans

    def _tokenized(
        self, group: Sequence[Rendered | RecordError | DataError]
    ) -> Iterator[Sample | RecordError | DataError]:
        texts = [found[0] for found in group if not isinstance(found, Exception)]
        encodings = iter(self.encoder.encode_batch(texts, add_special_tokens=False))
        for found in group:
            yield found if isinstance(found, Exception) else _masked(next(encodings), found[1])

    def text_of(self, conversation: Conversation) -> str:
        """What is tokenized.

        Raises:
            RecordError, DataError: see `sample`.
        """
        return self._renderer.rendered(conversation)[0]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        return str(self.encoder.decode(ids, skip_special_tokens=False))

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


def _masked(encoding: Any, spans: list[tuple[int, int]]) -> Sample | RecordError:
    """The tokens of a text, those from the first to the last of each span scored.

    Args:
        encoding: the library's, of the text.
        spans: see `Rendered`.
    """
    tokens = np.array(encoding.ids, dtype=np.uint32)
    scored = np.zeros(tokens.size, np.bool_)
    for start, stop in spans:
        # As transformers: through the first token of the last character. Characters that a normalizer drops have none;
        # transformers gives up on the rest of the conversation there, we look further inside the answer.
        first = next(filter(_is_token, map(encoding.char_to_token, range(start, stop))), None)
        last = next(filter(_is_token, map(encoding.char_to_token, range(stop - 1, start - 1, -1))), None)
        if first is not None and last is not None:
            scored[first : last + 1] = True
    if not scored[1:].any():
        return RecordError("the template shows none of its answers")
    return Sample(tokens, scored)


def _is_token(number: int | None) -> bool:
    return number is not None


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
