"""Text to token shards, once: `python -m tools.prepare_data --input TEXT --output DIR --tokenizer MODEL`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from pipeline.command import command
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import load_tokenizer
from pipeline.paths import user_path
from pipeline.reporting.progress import TokenProgress


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_at_least_one.__name__ = "number of processes"  # argparse puts it into its message


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tokenize text into shards that training maps into memory.")
    parser.add_argument(
        "--input", type=user_path, required=True, help="file or folder of .txt or .jsonl, plain or .xz, .gz, .zst"
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder to write; reused if it is up to date")
    parser.add_argument(
        "--tokenizer", type=user_path, required=True, help="model folder with tokenizer.json, or a sentencepiece .model"
    )
    parser.add_argument("--text-field", default="text", help="key of the text in .jsonl records (default: text)")
    parser.add_argument("--workers", type=_at_least_one, default=1, help="processes that tokenize (default: 1)")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(options.tokenizer)
    with TokenProgress(console=Console(stderr=True)) as progress:
        manifest = prepare(options.input, options.output, tokenizer, options.text_field, progress, options.workers)
    skipped = f" ({manifest.skipped} empty skipped)" if manifest.skipped else ""
    how = "written" if progress.calls else "up to date, reused"
    print(f"{options.output}: {manifest.tokens} tokens, {manifest.documents} documents{skipped}, {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
