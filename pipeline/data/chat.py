"""Conversations and plain text with answers to token ids, and which of them the loss counts.

The text of a conversation is what the chat template renders (see `rendering`); a completion is text as it is, with the
end of text behind it; labelled pieces are text with nothing around them. All are tokenized by the folder's
tokenizer.json, where, unlike in documents, special tokens are tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from parallel.errors import DataError
from pipeline.data.answer_ends import EndFinder
from pipeline.data.conversations import Completion, Conversation, Labelled, RecordError, Said, text_in
from pipeline.data.masks import Sample, behind_prompt, truncated, within_spans
from pipeline.data.places import as_array, byte_lengths, tokens_within
from pipeline.data.rendering import REASONING, Renderer
from pipeline.data.segments import SEGMENT
from pipeline.data.tokenizer import HfTokenizer, TextTokenizer
from pipeline.data.tokenizer_files import read_json

_Refusal = RecordError | DataError
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class _Text(NamedTuple):
    """What is to be tokenized."""

    text: str
    spans: list[tuple[int, int]]
    """From where to where the answers of a conversation stand, in characters."""
    prompt: str | None = None
    """Of a completion: how its text begins, which is not scored."""
    labelled: Labelled | None = None
    """The pieces that the text is to be tokenized in, if they are given."""


class ChatTemplate:
    """A chat template with the tokenizer it is for.

    Args:
        tokenizer: of a folder with tokenizer.json.
        file: a Jinja file to use instead of the folder's template.

    Attributes:
        source: the template's text; None: there is none, which will do for plain completions.
        file: as given.
        encoder: of the library, which makes tokens of special ones.
        special: id by content of the tokenizer's special tokens.
        ends: tells which tokens end the answers of a sample.
        identity: sha256 (hex) of what decides tokens and masks beyond the tokenizer's own identity.

    Raises:
        DataError: the template cannot be read or is no valid Jinja, or the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: TextTokenizer, file: Path | None = None) -> None:
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
        self.encoder = tokenizer.whole
        self.special = {
            token.content: number for number, token in self.encoder.get_added_tokens_decoder().items() if token.special
        }
        added = self.encoder.get_added_tokens_decoder().keys()
        numbers = frozenset(self.special.values())
        self.ends = EndFinder(numbers, frozenset(added) - numbers, self.decode)
        self._beginnings = {content[:2] for content in self.special}
        self._firsts = {content[:1] for content in self.special}
        self._lengths = byte_lengths(tokenizer.settings, self.encoder)
        self._end = self.encoder.id_to_token(tokenizer.eos_id) or ""
        self._special_ids = np.array(sorted(self.special.values()), dtype=np.uint32)
        names = {f"{role}_token": _content(config.get(f"{role}_token")) for role in _ROLES}
        self._names = {name: content for name, content in names.items() if content is not None}
        try:
            self._renderer = None if self.source is None else Renderer(self.source, self._names, tokenizer.path)
        except TemplateError as error:
            raise DataError(f"{file or tokenizer.path}: its chat template is no valid Jinja ({error}).") from error
        # Numbered anew where records are read or refused otherwise, so that what an earlier release made is made anew.
        around = self.encoder.encode("").ids
        settings = json.dumps(["chat 3", self.source, self._names, sorted(self.special.items()), around])
        self.identity = hashlib.sha256(settings.encode()).hexdigest()

    def holds_special(self, said: Said) -> str | None:
        """A special token whose spelling stands in what is said, where it becomes that token; None: there is none."""
        if isinstance(said, Labelled):
            return None  # they are written with their special tokens
        if isinstance(said, Completion):
            contents = [said.prompt, said.completion.removesuffix(self._end)]
        else:
            contents = [text_in(message.get("content")) for message in said.messages]
        # Hundreds of tokens begin alike: nearly all conversations are done with after a look for those beginnings.
        together = "".join(contents)
        if any(first in together for first in self._firsts) and any(
            beginning in together for beginning in self._beginnings
        ):
            for text in contents:
                for content in self.special:
                    if content in text:
                        return content
        return None

    def hides_tools(self, said: Said) -> bool:
        """Whether a conversation offers tools whose definitions the template does not show."""
        offers = isinstance(said, Conversation) and said.tools is not None
        return offers and self._renderer is not None and not self._renderer.reads_tools

    def hides_reasoning(self, said: Said) -> bool:
        """Whether a conversation has reasoning beside an answer, in fields of which the template shows none."""
        if not isinstance(said, Conversation) or self._renderer is None or self._renderer.reads_reasoning:
            return False
        return any(message.get(field) for message in said.messages for field in REASONING)

    def sample(self, said: Said) -> Sample:
        """Tokens and mask of all that a record says.

        Raises:
            RecordError: the template refuses the conversation or leaves some of it out, or nothing would be scored.
            DataError: there is no template for a conversation, or it has no marks, and renders the beginning of a
                conversation otherwise than the whole; or the tokenizer's files do not go together.
        """
        (found,) = self.samples([said])
        if isinstance(found, Sample):
            return found
        raise found

    def samples(self, all_said: Sequence[Said]) -> Iterator[Sample | _Refusal]:
        """Those of several, in order, which costs less than one by one; what `sample` raises stands in their places.

        They are tokenized in groups of no more than some `SEGMENT` characters.
        """
        group: list[_Text | _Refusal] = []
        characters = 0
        for said in all_said:
            found = self._written(said)
            group.append(found)
            characters += len(found.text) if isinstance(found, _Text) else 0
            if characters >= SEGMENT:
                yield from self._tokenized(group)
                group, characters = [], 0
        yield from self._tokenized(group)

    def _written(self, said: Said) -> _Text | _Refusal:
        try:
            if isinstance(said, Labelled):
                found = _Text("".join(said.pieces), [], labelled=said)
            else:
                found = self._completed(said) if isinstance(said, Completion) else self._rendered(said)
            if not found.text.isascii():
                found.text.encode("utf-8")
        except (RecordError, DataError) as error:
            return error
        except UnicodeEncodeError as error:
            refusal = RecordError("it escapes half a surrogate pair")
            refusal.__cause__ = error
            return refusal
        return found

    def _completed(self, said: Completion) -> _Text:
        if self.encoder.token_to_id(self._end) != self.tokenizer.eos_id:
            raise DataError(
                f"{self.tokenizer.path}: tokenizer.json has no token {self.tokenizer.eos_id}, which ends a text by the "
                "other files; copy the model's again."
            )
        # As TRL does it.
        end = "" if said.completion.endswith(self._end) else self._end
        return _Text(said.prompt + said.completion + end, [], said.prompt)

    def _rendered(self, said: Conversation) -> _Text:
        if self._renderer is None:
            place = self.tokenizer.path
            raise DataError(f"{place}: has no chat template (a base model?); give one with --chat-template FILE.")
        text, spans = self._renderer.rendered(said)
        self._renderer.check_shown(said, text)
        return _Text(text, spans)

    def _tokenized(self, group: Sequence[_Text | _Refusal]) -> Iterator[Sample | _Refusal]:
        texts = [found for found in group if isinstance(found, _Text)]
        conversations = self._conversations([each for each in texts if each.prompt is None and each.labelled is None])
        labelled = self._of_pieces([found.labelled for found in texts if found.labelled is not None])
        # What the tokenizer puts around a text belongs to plain text only: templates write it themselves.
        plain = chain.from_iterable((found.prompt, found.text) for found in texts if found.prompt is not None)
        halves = iter(self.encoder.encode_batch_fast(list(plain), add_special_tokens=True))
        for found in group:
            if not isinstance(found, _Text):
                yield found
                continue
            if found.labelled is not None:
                made, why = next(labelled), "the loss would count none of its tokens"
            elif found.prompt is not None:
                made, why = behind_prompt(next(halves).ids, next(halves).ids), "its completion makes no token"
            else:
                made, why = next(conversations), "the template shows none of its answers"
            yield made if made.scored[1:].any() else RecordError(why)

    def _conversations(self, texts: Sequence[_Text]) -> Iterator[Sample]:
        all_said = [found.text for found in texts]
        if self._lengths is None:
            encodings = self.encoder.encode_batch(all_said, add_special_tokens=False)
            yield from (within_spans(each, found.spans) for each, found in zip(encodings, texts, strict=True))
            return
        encodings = self.encoder.encode_batch_fast(all_said, add_special_tokens=False)
        for encoding, found in zip(encodings, texts, strict=True):
            tokens = as_array(encoding.ids)
            answers = tokens_within(self._lengths, tokens, found.text, found.spans)
            if answers is None:
                yield within_spans(self.encoder.encode(found.text, add_special_tokens=False), found.spans)
                continue
            scored = np.zeros(tokens.size, np.bool_)
            for first, stop in answers:
                scored[first:stop] = True
            yield Sample(tokens, scored)

    def _of_pieces(self, all_said: Sequence[Labelled]) -> Iterator[Sample]:
        """As Axolotl's input_output: every piece by itself, without what the tokenizer puts around a text."""
        pieces = [piece for said in all_said for piece in said.pieces]
        encodings = iter(self.encoder.encode_batch_fast(pieces, add_special_tokens=False))
        for said in all_said:
            ids = [next(encodings).ids for _ in said.pieces]
            scored = np.repeat(np.array(said.counted), [len(each) for each in ids])
            yield Sample(as_array(list(chain.from_iterable(ids))), scored)

    def text_of(self, said: Said) -> str:
        """What is tokenized.

        Raises:
            RecordError, DataError: see `sample`.
        """
        found = self._written(said)
        if isinstance(found, _Text):
            return found.text
        raise found

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        return str(self.encoder.decode(ids, skip_special_tokens=False))

    def truncated(self, sample: Sample, limit: int) -> Sample:
        """The sample in no more than `limit` tokens, see `masks.truncated`.

        Raises:
            RecordError: that is not enough.
        """
        return truncated(sample, limit, self._special_ids)


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _template(folder: Path, config: dict[str, Any], file: Path | None) -> str | None:
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
    return template if isinstance(template, str) else None
