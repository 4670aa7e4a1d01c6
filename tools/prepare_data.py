"""Text to token shards, once: `python -m tools.prepare_data --input TEXT --output DIR --tokenizer MODEL`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from parallel.errors import LongspanError
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import load_tokenizer

PLAIN_INTERVAL = 10.0
"""Seconds between progress lines in a log."""


class ProgressDisplay:
    """A bar on a terminal; elsewhere a line every PLAIN_INTERVAL seconds. Use as a context manager.

    Args:
        stream: where to show it.

    Attributes:
        calls: times progress was told; 0 means that nothing had to be done.
    """

    def __init__(self, stream: TextIO) -> None:
        self.calls = 0
        self._stream = stream
        self._told = time.monotonic()
        self._bar: Progress | None = None
        console = Console(file=stream)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("tokenizing"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[tokens]:,} tokens"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", tokens=0, total=None)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """See pipeline.data.prepare.Progress."""
        self.calls += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, tokens=tokens)
        elif time.monotonic() - self._told >= PLAIN_INTERVAL:
            self._told = time.monotonic()
            print(f"tokenizing: {done / max(total, 1):.0%}, {tokens} tokens", file=self._stream, flush=True)


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_at_least_one.__name__ = "number of processes"  # argparse puts it into its message


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tokenize text into shards that training maps into memory.")
    parser.add_argument(
        "--input", type=Path, required=True, help="file or folder of .txt or .jsonl, plain or .xz, .gz, .zst"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; reused if it is up to date")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="model folder with tokenizer.json, or a sentencepiece .model"
    )
    parser.add_argument("--text-field", default="text", help="key of the text in .jsonl records (default: text)")
    parser.add_argument("--workers", type=_at_least_one, default=1, help="processes that tokenize (default: 1)")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        with ProgressDisplay(sys.stderr) as progress:
            manifest = prepare(options.input, options.output, tokenizer, options.text_field, progress, options.workers)
    except LongspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    skipped = f" ({manifest.skipped} empty skipped)" if manifest.skipped else ""
    how = "written" if progress.calls else "up to date, reused"
    print(f"{options.output}: {manifest.tokens} tokens, {manifest.documents} documents{skipped}, {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
