"""Text or conversations to token shards: `python -m tools.prepare_data --input IN --output DIR --tokenizer MODEL`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from parallel.errors import ConfigError, DataError
from pipeline.config.hub import DATASET, not_there
from pipeline.config.paths import dataset_path, model_path, user_path
from pipeline.config.patterns import is_pattern
from pipeline.data.card import PAGE, read_card, summary
from pipeline.data.chat import ChatTemplate
from pipeline.data.chat_records import AS_NAMED, conversation_files, passed_over
from pipeline.data.discovery import matches_of, splits_of
from pipeline.data.document_ends import Ends, described
from pipeline.data.held_out import WHOLE, Part
from pipeline.data.once import together
from pipeline.data.prepare import left_out, prepare, up_to_date
from pipeline.data.prepare_chat import Account, chat_up_to_date, chosen_records, prepare_chat, samples
from pipeline.data.readings import differing_readings
from pipeline.data.schemas import READ
from pipeline.data.shards import is_prepared, open_shards
from pipeline.data.token_files import FLAT, FlatFile, MegatronFile, TokenFile, megatron_index, prepare_tokens
from pipeline.data.tokenizer import TextTokenizer, check_rows, load_tokenizer
from pipeline.planning.arch import read_arch
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, checked, whole_number
from pipeline.reporting.progress import TokenProgress
from pipeline.reporting.words import counted
from tools.support.card_plot import plot_lengths
from tools.support.show_chat import print_sample

_CHOICES: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}


def _columns(text: str) -> dict[str, str]:
    """What `--columns` says: keys of the records by what they are read as."""
    found: dict[str, str] = {}
    for pair in text.split(","):
        known, is_there, own = pair.partition("=")
        if not (is_there and own) or known in found:
            raise argparse.ArgumentTypeError(f"must be like instruction=question,output=answer, got {text!r}")
        if known not in READ:
            raise argparse.ArgumentTypeError(f"knows no {known!r}; a record is read as {', '.join(READ)}")
        found[known] = own
    return found


def _too_many_tokens(place: Path, tokenizer: TextTokenizer) -> list[str]:
    """A warning where the model beside the tokenizer has fewer rows: training on the tokens needs more."""
    try:
        rows = read_arch(place if place.is_dir() else place.parent).vocab
    except ConfigError:
        return []  # no model, or none that trains: only a tokenizer was asked for
    try:
        check_rows(tokenizer, rows)
    except ConfigError as error:
        return [str(error)]
    return []


def _show_card(folder: Path, what: str, fresh: bool) -> None:
    """Say what the data card says of lengths; a fresh folder also gets their picture."""
    card = read_card(folder)
    if card is None:
        return
    shards = open_shards(folder)
    if fresh:
        plot_lengths(folder, np.diff(np.append(shards.starts, len(shards))), what)
    print(f"{summary(card)}; see {folder / PAGE}")


def _chat(
    options: argparse.Namespace, tokenizer: TextTokenizer, template: ChatTemplate, place: Path, part: Part
) -> Callable[[Path], None]:
    """Prepare conversations at a place; returns what tells of it, given the folder where it is then."""
    manifest, account = prepare_chat(
        options.input, place, template, options.max_tokens, part, options.workers, options.columns
    )

    def tell(out: Path) -> None:
        for warning in (*account.sentences(), *_too_many_tokens(options.tokenizer, tokenizer)):
            print(f"warning: {warning}", file=sys.stderr)
        skipped = f" ({manifest.skipped} left out)" if manifest.skipped else ""
        how = f"{account.scored} scored, written" if account.samples else "up to date, reused"
        print(
            f"{out}: {counted(manifest.tokens, 'token')}, {counted(manifest.documents, 'conversation')}{skipped}, {how}"
        )
        _show_card(out, "conversations", bool(account.samples))

    return tell


def _token_file(options: argparse.Namespace, parser: argparse.ArgumentParser) -> TokenFile | None:
    """The token ids that the input holds; None: it holds text or conversations."""
    index = megatron_index(options.input)
    if index is None and options.tokens is None:
        return None
    if index is not None and options.tokens is not None:
        parser.error("--tokens is for arrays of token ids; a Megatron index says itself what its .bin holds")
    if options.chat or options.held_out or (options.bos, options.eos) != ("auto", "auto"):
        parser.error("--chat, --held-out, --bos and --eos are for text and conversations; the input is token ids")
    return MegatronFile(index) if index is not None else FlatFile(options.input, options.tokens)


def _tokens(options: argparse.Namespace, tokenizer: TextTokenizer, source: TokenFile) -> int:
    with TokenProgress(console=Console(stderr=True)) as progress:
        manifest = prepare_tokens(source, options.output, tokenizer, progress)
    card = read_card(options.output) if progress.calls else None
    for warning in (card["warnings"] if card is not None else []) + _too_many_tokens(options.tokenizer, tokenizer):
        print(f"warning: {warning}", file=sys.stderr)
    how = "written" if progress.calls else "up to date, reused"
    held = f"{counted(manifest.tokens, 'token')}, {counted(manifest.documents, 'document')}"
    print(f"{options.output}: {held}, {how}")
    _show_card(options.output, "documents", bool(progress.calls))
    return 0


def _text(
    options: argparse.Namespace, tokenizer: TextTokenizer, ends: Ends, place: Path, part: Part
) -> Callable[[Path], None]:
    """As `_chat`, of text."""
    with TokenProgress(console=Console(stderr=True)) as progress:
        manifest = prepare(
            options.input, place, tokenizer, options.text_field, progress, options.workers, ends=ends, part=part
        )

    def tell(out: Path) -> None:
        card = read_card(out) if progress.calls else None
        warned = card["warnings"] if card is not None else []
        for warning in (
            *warned,
            *left_out(options.input, options.text_field),
            *_too_many_tokens(options.tokenizer, tokenizer),
        ):
            print(f"warning: {warning}", file=sys.stderr)
        skipped = f" ({manifest.skipped} empty skipped)" if manifest.skipped else ""
        print(f"{out}: every document {described(*manifest.ends, tokenizer.prompt_start)}")
        how = "written" if progress.calls else "up to date, reused"
        print(f"{out}: {counted(manifest.tokens, 'token')}, {counted(manifest.documents, 'document')}{skipped}, {how}")
        _show_card(out, "documents", bool(progress.calls))

    return tell


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser("tools.prepare_data", "Tokenize text into shards that training maps into memory.", "DATA.md")
    parser.add_argument(
        "--input",
        type=dataset_path,
        required=True,
        help="file, folder or (in quotes) pattern of text, JSON, CSV, plain or packed, Parquet or Arrow; or the Hub's "
        "name of a data set that was downloaded",
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder to write; reused if it is up to date")
    parser.add_argument(
        "--tokenizer",
        type=model_path,
        required=True,
        help="model folder with tokenizer.json, or a sentencepiece .model",
    )
    parser.add_argument("--text-field", default="text", help="key or column of the text (default: text)")
    for name, place in (("bos", "before (auto: no)"), ("eos", "behind (auto: yes)")):
        parser.add_argument(
            f"--{name}",
            choices=_CHOICES,
            default="auto",
            help=f"put {name.upper()} {place} every document of text",
        )
    parser.add_argument(
        "--held-out",
        type=checked(float, lambda share: 0 < share < 1, "a share between 0 and 1, such as 0.01", metavar="SHARE"),
        help="of the documents: they go to OUTPUT/validation, the others to OUTPUT/train",
    )
    parser.add_argument("--workers", type=whole_number(), default=1, help="processes that tokenize (default: 1)")
    parser.add_argument("--tokens", choices=FLAT, help="input is an array of token ids, as LongLoRA's .bin")
    parser.add_argument(
        "--chat", action="store_true", help="input is conversations (messages, ShareGPT, Alpaca, prompt and completion)"
    )
    parser.add_argument(
        "--columns",
        type=_columns,
        default=AS_NAMED,
        metavar="KNOWN=OWN,...",
        help="keys or columns of other names, by what they are read as: instruction=question,output=answer",
    )
    parser.add_argument("--chat-template", type=user_path, help="Jinja file (default: the tokenizer's own template)")
    parser.add_argument("--max-tokens", type=whole_number(), help="truncate longer conversations (default: never)")
    parser.add_argument("--show", type=whole_number(), help="print so many conversations with what the loss counts")
    options = parser.parse_args(arguments)
    if not (options.input.exists() or is_pattern(options.input)):
        raise DataError(
            f"{options.input}: no such file or folder; point it at text, or with --chat at conversations"
            f"{not_there(str(options.input), DATASET)}."
        )
    matches = matches_of(options.input)
    tokenizer = load_tokenizer(options.tokenizer)
    if options.chat and (options.bos, options.eos) != ("auto", "auto"):
        parser.error("--bos and --eos are for text; conversations begin and end as their chat template says")
    tokens = _token_file(options, parser)
    if tokens is not None:
        return _tokens(options, tokenizer, tokens)
    if matches:
        print(matches)
    if not options.chat and (options.chat_template or options.max_tokens or options.show or options.columns):
        parser.error("--chat-template, --columns, --max-tokens and --show are for --chat")
    parts = {options.output: WHOLE}
    if options.held_out:
        if is_prepared(options.output):
            raise DataError(
                f"{options.output}: holds prepared tokens, not the two parts of a split; choose another folder."
            )
        train, validation = Part(options.held_out), Part(options.held_out, held_out=True)
        parts = {options.output / "train": train, options.output / "validation": validation}
    if options.chat:
        template = ChatTemplate(tokenizer, options.chat_template)
        made = (
            sample
            for record in chosen_records(options.input, columns=options.columns)
            for sample in samples([record], template, options.max_tokens, Account())
        )
        for record, sample in islice(made, options.show or 0):
            print_sample(Console(), record.where, sample, template)
        files = conversation_files(options.input)
        for warning in (*passed_over(options.input), *splits_of(options.input, files)):
            print(f"warning: {warning}", file=sys.stderr)
        fresh = partial(
            chat_up_to_date,
            options.input,
            template=template,
            max_tokens=options.max_tokens,
            columns=options.columns,
        )
    else:
        for warning in differing_readings(tokenizer):
            print(f"warning: {warning}", file=sys.stderr)
        ends = Ends(_CHOICES[options.bos], _CHOICES[options.eos])
        fresh = partial(up_to_date, options.input, tokenizer=tokenizer, text_field=options.text_field, ends=ends)
    told = []
    with together(list(parts), lambda: all(fresh(out=out, part=part) for out, part in parts.items())) as places:
        for folder, part in zip(places, parts.values(), strict=True):
            if options.chat:
                told.append(_chat(options, tokenizer, template, folder, part))
            else:
                told.append(_text(options, tokenizer, ends, folder, part))
    for tell, out in zip(told, parts, strict=True):
        tell(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
