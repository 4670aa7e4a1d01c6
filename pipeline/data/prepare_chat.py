"""Conversations to a shard folder with masks, once: the work behind `tools.prepare_data --chat`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.answer_ends import ChatFormat
from pipeline.data.card import Notes
from pipeline.data.chat import ChatTemplate
from pipeline.data.chat_records import AS_NAMED, Columns, Record, conversation_files, read_records
from pipeline.data.conversations import Conversation, RecordError, Said, conversation_of
from pipeline.data.document_ends import AUTO
from pipeline.data.held_out import WHOLE, Part
from pipeline.data.masks import Sample
from pipeline.data.once import describe, intact, named, once, same_files
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.shards import Manifest
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.workers import BATCH_CHARACTERS, in_order, one_thread
from pipeline.reporting.words import counted

SPELLED, WITHOUT_TOOLS, WITHOUT_REASONING = "spelled", "without tools", "without reasoning"
JOINED, TRUNCATED, ENDLESS = "joined", "truncated", "endless"
_REMARKS = {
    SPELLED: (
        ("{} conversation spells a special token in its text", "{} conversations spell a special token in their text"),
        ", which becomes that token (first: {first}).",
    ),
    WITHOUT_TOOLS: (
        ("{} conversation offers tools", "{} conversations offer tools"),
        " whose definitions the chat template does not show (first: {first}); give one that knows tools with "
        "--chat-template.",
    ),
    WITHOUT_REASONING: (
        ("{} conversation has reasoning beside its answers", "{} conversations have reasoning beside their answers"),
        " (reasoning_content or the like), which the chat template does not show (first: {first}); give one that does "
        "with --chat-template, or write it into the content.",
    ),
    JOINED: (
        ("{} prompt ends", "{} prompts end"),
        " inside a token that the completion goes on with (first: {first}), so the model is trained on other tokens "
        "than it is asked with; move what they share, such as a space, to the completion.",
    ),
    TRUNCATED: (
        ("{} conversation is truncated: the middle of its", "{} conversations are truncated: the middle of their"),
        " longest part is left out.",
    ),
    ENDLESS: (
        ("{} conversation has no answer", "{} conversations have no answer"),
        " that ends with a special token which the loss counts (first: {first}), so the model does not learn to stop; "
        "give a template that ends answers with a token of this tokenizer, inside its {{% generation %}} marks if it "
        "has any.",
    ),
}
"""What is told of records that are kept: of one, of several, and how the sentence goes on."""


@dataclass
class Account:
    """What became of the records."""

    samples: int = 0
    rendered: int = 0
    """Of those, what went through the chat template."""
    scored: int = 0
    """Tokens the loss counts."""
    refused: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    remarked: Counter[str] = field(default_factory=Counter)
    """Records kept that something is told of, by what (`_REMARKS`)."""
    ends: Counter[int] = field(default_factory=Counter)
    """Answers by the token that ends them, of records that do not spell special tokens themselves."""
    within: set[int] = field(default_factory=set)
    """Special tokens that text follows in answers of those records."""
    examples: dict[str, str] = field(default_factory=dict)
    """Place of the first record by reason or remark."""

    def refuse(self, reason: str, place: str) -> None:
        """Count a record that is left out."""
        self.refused[reason] += 1
        self.examples.setdefault(reason, place)

    def remark(self, what: str, place: str) -> None:
        """Count a record that something is told of."""
        self.remarked[what] += 1
        self.examples.setdefault(what, place)

    def add(self, later: Account) -> None:
        """Count what became of the records behind these as well."""
        self.samples += later.samples
        self.rendered += later.rendered
        self.scored += later.scored
        self.refused += later.refused
        self.remarked += later.remarked
        self.ends += later.ends
        self.within |= later.within
        self.examples = later.examples | self.examples

    def sentences(self) -> list[str]:
        """What to warn of."""
        return [
            f"{counted(count, 'record is', 'records are')} left out: {reason} (first: {self.examples[reason]})."
            for reason, count in sorted(self.refused.items())
        ] + self.remarks()

    def remarks(self) -> list[str]:
        """What to warn of in those that are kept."""
        return [
            (one if self.remarked[what] == 1 else several).format(self.remarked[what])
            + rest.format(first=self.examples[what])
            for what, ((one, several), rest) in _REMARKS.items()
            if self.remarked[what]
        ]


def samples(
    records: list[Record], template: ChatTemplate, max_tokens: int | None, account: Account
) -> Iterator[tuple[Record, Sample]]:
    """Those of the records that can be trained on, with their tokens; the others are counted in `account`.

    Raises:
        DataError: the template is not prefix-stable, see `ChatTemplate`.
    """
    told: list[tuple[Record, Said | RecordError]] = []
    for record in records:
        try:
            told.append((record, conversation_of(record.value, record.schema)))
        except RecordError as error:
            told.append((record, error))
    made = template.samples([what for _, what in told if not isinstance(what, RecordError)])
    for record, what in told:
        found = what if isinstance(what, RecordError) else next(made)
        try:
            if isinstance(found, Sample) and max_tokens is not None:
                found = template.truncated(found, max_tokens)
        except RecordError as error:
            found = error
        if isinstance(found, DataError):
            raise DataError(f"{record.where}: {found}") from found
        if isinstance(found, RecordError):
            account.refuse(str(found), record.where)
            continue
        assert not isinstance(what, RecordError), "the sample is of what it says"
        spelled = template.holds_special(what)
        if spelled is not None:
            account.remark(SPELLED, f"{spelled!r} at {record.where}")
        ends, within = template.ends.ends(found)
        if spelled is None:
            account.ends += ends
            account.within |= within
        if not ends:
            account.remark(ENDLESS, record.where)
        if template.hides_tools(what):
            account.remark(WITHOUT_TOOLS, record.where)
        if template.hides_reasoning(what):
            account.remark(WITHOUT_REASONING, record.where)
        if found.joined:
            account.remark(JOINED, record.where)
        if found.cut:
            account.remark(TRUNCATED, record.where)
        account.samples += 1
        account.rendered += isinstance(what, Conversation)
        account.scored += int(np.count_nonzero(found.scored[1:]))
        yield record, found


def chosen_records(source: Path, part: Part = WHOLE, columns: Columns = AS_NAMED) -> Iterator[Record]:
    """The records of a part.

    Args:
        columns: see `read_records`.

    Raises:
        DataError: a file cannot be read, see `read_records`.
    """
    for file in conversation_files(source):
        for record in read_records(file, columns):
            if not part.share or part.takes(json.dumps(record.value, sort_keys=True, default=str)):
                yield record


def _characters(value: Any) -> int:
    """Of all text in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _batches(records: Iterator[Record]) -> Iterator[tuple[list[Record], None]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += _characters(record.value)
        if characters >= BATCH_CHARACTERS:
            yield batch, None
            batch, characters = [], 0
    if batch:
        yield batch, None


Prepared = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.bool_], Account]
"""Tokens of conversations, lengths of each, masks, see `ShardWriter.add_samples`; and what became of the records."""


def _prepared(batch: list[Record], template: ChatTemplate, max_tokens: int | None) -> Prepared:
    account = Account()
    made = [sample for _, sample in samples(batch, template, max_tokens, account)]
    lengths = np.array([sample.tokens.size for sample in made], np.int64)
    tokens = np.concatenate([np.zeros(0, np.uint32), *(sample.tokens for sample in made)])
    return tokens, lengths, np.concatenate([np.zeros(0, np.bool_), *(sample.scored for sample in made)]), account


# What a worker process prepares with; a template does not travel between processes, its paths do.
_worker: tuple[ChatTemplate, int | None] | None = None


def _start_worker(path: Path, file: Path | None, max_tokens: int | None) -> None:
    global _worker
    _worker = ChatTemplate(load_tokenizer(path), file), max_tokens


def _prepare_in_worker(batch: list[Record]) -> Prepared:
    assert _worker is not None  # set by the pool's initializer
    return _prepared(batch, *_worker)


def _all_prepared(
    records: Iterator[Record], template: ChatTemplate, max_tokens: int | None, workers: int
) -> Iterator[Prepared]:
    """Batches in the order of the records, whatever the number of worker processes."""
    if workers == 1:
        yield from (_prepared(batch, template, max_tokens) for batch, _ in _batches(records))
        return
    path = template.tokenizer.path
    start = (path, template.file, max_tokens)
    done = in_order(_batches(records), _prepare_in_worker, workers, _start_worker, start, path)
    yield from (prepared for prepared, _ in done)


def _identity(template: ChatTemplate, max_tokens: int | None, columns: Columns) -> str:
    read_as = json.dumps(columns, sort_keys=True) if columns else ""
    return hashlib.sha256(f"{template.identity} {max_tokens}{read_as}".encode()).hexdigest()


def chat_up_to_date(
    source: Path,
    out: Path,
    template: ChatTemplate,
    max_tokens: int | None,
    part: Part = WHOLE,
    columns: Columns = AS_NAMED,
) -> Manifest | None:
    """The manifest at `out` if it was made of these conversations in this way and is intact, else None."""
    manifest = intact(out, template.tokenizer)
    identity = _identity(template, max_tokens, columns)
    if manifest is None or (manifest.chat, manifest.part) != (identity, part.name):
        return None
    return manifest if same_files(named(source, conversation_files(source)), manifest.sources) else None


def prepare_chat(
    source: Path,
    out: Path,
    template: ChatTemplate,
    max_tokens: int | None,
    part: Part = WHOLE,
    workers: int = 1,
    columns: Columns = AS_NAMED,
) -> tuple[Manifest, Account]:
    """Tokenize the conversations at `source` into the shard folder `out`, with a mark for every token that is scored.

    A folder made of the same files by the same template is left as it is; its `Account` is empty then.

    Args:
        workers: processes that render and tokenize; the result does not depend on it.
        columns: see `read_records`.

    Raises:
        DataError: see `chosen_records` and `samples`; no record can be trained on; `out` holds something else or cannot
            be written.
    """
    account = Account()
    files = named(source, conversation_files(source))

    def write(out: Path) -> Manifest:
        entries = describe(files)
        with one_thread(), ShardWriter(out, template.tokenizer) as writer:
            records = chosen_records(source, part, columns)
            for tokens, lengths, scored, became in _all_prepared(records, template, max_tokens, workers):
                writer.add_samples(tokens, lengths, scored)
                account.add(became)
            if not account.samples:
                reasons = " ".join(account.sentences()) or "It holds no record."
                raise DataError(f"{source}: nothing in it can be trained on. {reasons}")
            notes = Notes(account.refused, account.examples, account.scored, account.remarks())
            identity = _identity(template, max_tokens, columns)
            # One that no record went through is not what the model is to be asked by.
            shown_by = (template.source or "") if account.rendered else ""
            asked = ChatFormat(shown_by, tuple(sorted(account.ends.keys() - account.within)))
            return writer.finish(entries, account.refused.total(), "", identity, notes, AUTO, part.name, asked)

    def up_to_date(found: Path) -> Manifest | None:
        return chat_up_to_date(source, found, template, max_tokens, part, columns)

    return once(out, up_to_date, write), account
