"""Text to token shards, once: `python -m tools.prepare_data --input TEXT --output DIR --tokenizer MODEL`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parallel.errors import ConfigError
from pipeline.config.paths import user_path
from pipeline.data.prepare import left_out, prepare
from pipeline.data.readings import told_differences
from pipeline.data.tokenizer import TextTokenizer, check_rows, load_tokenizer
from pipeline.planning.arch import read_arch
from pipeline.reporting.command import command
from pipeline.reporting.progress import TokenProgress


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_at_least_one.__name__ = "number of processes"  # argparse puts it into its message


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


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tokenize text into shards that training maps into memory.")
    parser.add_argument(
        "--input", type=user_path, required=True, help=".txt or JSON lines, plain or packed (.xz .gz .zst)"
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder to write; reused if it is up to date")
    parser.add_argument(
        "--tokenizer", type=user_path, required=True, help="model folder with tokenizer.json, or a sentencepiece .model"
    )
    parser.add_argument("--text-field", default="text", help="key of the text in .jsonl records (default: text)")
    parser.add_argument("--workers", type=_at_least_one, default=1, help="processes that tokenize (default: 1)")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(options.tokenizer)
    for warning in told_differences(tokenizer):
        print(f"warning: {warning}", file=sys.stderr)
    with TokenProgress(console=Console(stderr=True)) as progress:
        manifest = prepare(options.input, options.output, tokenizer, options.text_field, progress, options.workers)
    for warning in (*left_out(options.input, options.text_field), *_too_many_tokens(options.tokenizer, tokenizer)):
        print(f"warning: {warning}", file=sys.stderr)
    skipped = f" ({manifest.skipped} empty skipped)" if manifest.skipped else ""
    how = "written" if progress.calls else "up to date, reused"
    print(f"{options.output}: {manifest.tokens} tokens, {manifest.documents} documents{skipped}, {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
