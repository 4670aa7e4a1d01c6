"""Conversations to a shard folder with masks, once: the work behind `tools.prepare_data --chat`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from parallel.errors import DataError
from pipeline.data.card import Notes
from pipeline.data.chat import ChatTemplate, Sample
from pipeline.data.conversations import Record, RecordError, conversation_files, conversation_of, read_records
from pipeline.data.held_out import WHOLE, Part
from pipeline.data.once import describe, intact, named, once, same_files
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.shards import Manifest


@dataclass
class Account:
    """What became of the records."""

    samples: int = 0
    scored: int = 0
    """Tokens the loss counts."""
    truncated: int = 0
    special: int = 0
    """Conversations whose text spells a special token."""
    refused: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """Place of the first record by reason."""
    spelled: tuple[str, str] | None = None
    """The first special token that a text spells, and its place."""

    def sentences(self) -> list[str]:
        """What to warn of."""
        return [
            f"{count} {'record is' if count == 1 else 'records are'} left out: {reason} (first: "
            f"{self.examples[reason]})."
            for reason, count in sorted(self.refused.items())
        ] + self.remarks()

    def remarks(self) -> list[str]:
        """What to warn of in those that are kept."""
        lines = []
        if self.spelled is not None:
            token, place = self.spelled
            lines.append(
                f"{self.special} conversations spell a special token in their text, which becomes that token (first: "
                f"{token!r} at {place})."
            )
        if self.truncated:
            lines.append(f"{self.truncated} conversations are truncated: the middle of their longest part is left out.")
        return lines


def samples(
    source: Path, template: ChatTemplate, max_tokens: int | None, account: Account, part: Part = WHOLE
) -> Iterator[tuple[Record, Sample]]:
    """Every record of a part that can be trained on, with its tokens; the others are counted in `account`.

    Raises:
        DataError: a file cannot be read, see `read_records`; the template is not prefix-stable, see `ChatTemplate`.
    """
    for file in conversation_files(source):
        for record in read_records(file):
            if part.share and not part.takes(json.dumps(record.value, sort_keys=True, default=str)):
                continue
            try:
                conversation = conversation_of(record.value)
                sample = template.sample(conversation)
                if max_tokens is not None:
                    sample = template.truncated(sample, max_tokens)
            except RecordError as error:
                account.refused[str(error)] += 1
                account.examples.setdefault(str(error), record.where)
                continue
            except DataError as error:
                raise DataError(f"{record.where}: {error}") from error
            spelled = template.holds_special(conversation)
            if spelled is not None:
                account.spelled = account.spelled or (spelled, record.where)
                account.special += 1
            account.samples += 1
            account.scored += int(sample.scored[1:].sum())
            account.truncated += sample.cut > 0
            yield record, sample


def _identity(template: ChatTemplate, max_tokens: int | None) -> str:
    return hashlib.sha256(f"{template.identity} {max_tokens}".encode()).hexdigest()


def chat_up_to_date(
    source: Path, out: Path, template: ChatTemplate, max_tokens: int | None, part: Part = WHOLE
) -> Manifest | None:
    """The manifest at `out` if it was made of these conversations in this way and is intact, else None."""
    manifest = intact(out, template.tokenizer)
    if manifest is None or (manifest.chat, manifest.part) != (_identity(template, max_tokens), part.name):
        return None
    return manifest if same_files(named(source, conversation_files(source)), manifest.sources) else None


def prepare_chat(
    source: Path, out: Path, template: ChatTemplate, max_tokens: int | None, part: Part = WHOLE
) -> tuple[Manifest, Account]:
    """Tokenize the conversations at `source` into the shard folder `out`, with a mark for every token that is scored.

    A folder made of the same files by the same template is left as it is; its `Account` is empty then.

    Raises:
        DataError: see `samples`; no record can be trained on; `out` holds something else or cannot be written.
    """
    account = Account()
    files = named(source, conversation_files(source))

    def write(out: Path) -> Manifest:
        entries = describe(files)
        with ShardWriter(out, template.tokenizer) as writer:
            for _, sample in samples(source, template, max_tokens, account, part):
                writer.add_sample(sample.tokens, sample.scored)
            if not account.samples:
                reasons = " ".join(account.sentences()) or "It holds no record."
                raise DataError(f"{source}: nothing in it can be trained on. {reasons}")
            notes = Notes(account.refused, account.examples, account.scored, account.remarks())
            identity = _identity(template, max_tokens)
            return writer.finish(entries, account.refused.total(), "", identity, notes, part=part.name)

    return once(out, lambda found: chat_up_to_date(source, found, template, max_tokens, part), write), account
