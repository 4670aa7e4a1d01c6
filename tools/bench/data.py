"""How fast text becomes tokens and tokens become batches, and what a million samples do to the memory.

    python -m tools.bench.data --tokenizer DIR [--text launch/demo/train] [--megabytes 8] [--workers 1] [--json FILE]

Tokenizing (`pipeline.data.prepare`: reading, cutting, tokenizing, writing, hashing) stands beside the tokenizers
library alone on the same documents in memory (`encode_batch_fast` in as many threads), turn by turn; of each the best
time by the clock and by processor time, which other work on the machine disturbs less. The loader draws batches of text
and of a mixture; a bound of what a GPU trains stands beside it. Memory is RssAnon: pages of the mapped shards are the
kernel's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipeline.config.paths import user_path
from pipeline.data.loader import TrainLoader
from pipeline.data.mixed import MixedWindows
from pipeline.data.packing import PackedDataset
from pipeline.data.prepare import prepare
from pipeline.data.records import RecordReader
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.shards import TokenShards, open_shards
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.reporting.command import command
from pipeline.training.run_record import git_commit
from tools.support.bench_rows import append_rows, print_rows

ROUNDS = 7
DOCUMENT = 20_000
"""Characters of a document of the tokenizing bench: a chapter."""
H100_FLOPS = 989e12
"""Dense bf16 a second."""
PARAMETERS_7B = 6.7e9
SAMPLES = 1_000_000
SHARD_TOKENS = (60_000_000, 40_000_000)
"""Random tokens of the two sources that are loaded."""


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process and its children on processors."""

    def used() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    clock, processor = time.perf_counter(), used()
    work()
    return time.perf_counter() - clock, used() - processor


def tokenizing(folder: Path, text: Path, megabytes: float, workers: int) -> list[dict[str, Any]]:
    """Characters a second of preparing and of the library alone."""
    tokenizer = load_tokenizer(folder)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = "".join(document.text for document in RecordReader(text))
    wanted = int(megabytes * 1e6)
    # The text again and again, cut elsewhere each time.
    stream = itertools.chain.from_iterable(
        (whole[start : start + DOCUMENT] for start in range(997 * turn % DOCUMENT, len(whole) - DOCUMENT, DOCUMENT))
        for turn in itertools.count()
    )
    documents = list(itertools.islice(stream, wanted // DOCUMENT))
    characters = sum(map(len, documents))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "text.jsonl"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents)

        def ours(turn: int) -> None:
            prepare(source, Path(place) / f"out-{turn}", tokenizer, workers=workers)

        def library() -> None:
            for start in range(0, len(documents), 64):
                alone.encode_batch_fast(documents[start : start + 64], add_special_tokens=False)

        times: dict[str, list[tuple[float, float]]] = {"prepare": [], "tokenizers": []}
        for turn in range(ROUNDS):
            times["tokenizers"].append(measured(library))
            times["prepare"].append(measured(lambda turn=turn: ours(turn)))  # type: ignore[misc]
        best = {name: [min(column) for column in zip(*each, strict=True)] for name, each in times.items()}
        for name, (clock, processor) in best.items():
            rows.append(
                {
                    "what": name,
                    "M characters": characters / 1e6,
                    "M characters/s": characters / clock / 1e6,
                    "of the library's, by the clock": best["tokenizers"][0] / clock,
                    "by processor time": best["tokenizers"][1] / processor,
                }
            )
    return rows


def random_shards(folder: Path, tokenizer: TextTokenizer, tokens: int, seed: int) -> TokenShards:
    """Random documents of 1000 tokens each."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, tokenizer) as writer:
        for start in range(0, tokens, 1 << 24):
            count = min(1 << 24, tokens - start) // 1000
            writer.add(rng.integers(0, tokenizer.vocab_size, 1000 * count, np.uint32), np.full(count, 1000))
        writer.finish((), 0, "text")
    return open_shards(folder)


def loading(first: TokenShards, second: TokenShards, sequence: int) -> list[dict[str, Any]]:
    """Tokens a second that one loader makes into batches, none of them waited for beside training."""
    rows = []
    text = PackedDataset(first, sequence)
    mixture = MixedWindows([text, PackedDataset(second, sequence)], [Fraction(2), Fraction(1)])
    for name, dataset in (("text", text), ("mixture", mixture)):
        for mask in (False, True):
            with TrainLoader(dataset, 1, 16, 1, 0, 1, mask) as loader:
                loader.step(0)
                steps = max(3, SHARD_TOKENS[0] // (16 * sequence))
                clock, _ = measured(lambda: [loader.step(step) for step in range(1, steps + 1)])  # noqa: B023
            pace = steps * 16 * sequence / clock
            rows.append(
                {
                    "what": f"{name}, documents masked" if mask else name,
                    "sequence": sequence,
                    "M tokens/s": pace / 1e6,
                    # Forward and the backward pass through frozen matrices: 4 operations a parameter and token.
                    "times an H100 at 7B and its full FLOP/s": pace * 4 * PARAMETERS_7B / H100_FLOPS,
                }
            )
    return rows


def anonymous() -> int:
    """RssAnon of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def remembering(first: TokenShards, second: TokenShards) -> list[dict[str, Any]]:
    """Memory over a million samples of a mixture, and how long it takes to go on at the ten-millionth."""
    parts = [PackedDataset(store, 64) for store in (first, second)]
    dataset = MixedWindows(parts, [Fraction(2), Fraction(1)])
    rows = []
    with TrainLoader(dataset, 1, 1000, 100, 0, 1, False) as loader:
        for step in range(SAMPLES // 1000 + 1):
            loader.step(step)
            if step in (SAMPLES // 100_000, SAMPLES // 10_000, SAMPLES // 2000, SAMPLES // 1000):
                rows.append({"what": f"{step * 1000:,} samples", "MiB": anonymous() / 2**20})
    fresh = MixedWindows(parts, [Fraction(2), Fraction(1)])
    clock, processor = measured(lambda: fresh.order(1, 10_000_000, 1000))
    rows.append({"what": f"at sample 10,000,000 of {len(fresh):,}", "seconds": clock, "processor": processor})
    return rows


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=user_path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--text", type=user_path, default=Path("launch/demo/train"), help="default: %(default)s")
    parser.add_argument("--megabytes", type=float, default=8, help="of text to tokenize (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, and threads of the library (default: 1)")
    parser.add_argument("--sequence", type=int, default=32768, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="append the figures to FILE")
    args = parser.parse_args(arguments)
    # Before the library starts its threads.
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.workers > 1 else "false"
    rows = tokenizing(args.tokenizer, args.text, args.megabytes, args.workers)
    print_rows(rows, f"tokenizing, {args.workers} workers", 120)
    with tempfile.TemporaryDirectory() as place:
        tokenizer = load_tokenizer(args.tokenizer)
        first, second = (
            random_shards(Path(place) / str(seed), tokenizer, tokens, seed) for seed, tokens in enumerate(SHARD_TOKENS)
        )
        fed = loading(first, second, args.sequence)
        print_rows(fed, "loading", 120)
        kept = remembering(first, second)
        print_rows(kept, "memory and resuming", 120)
    facts = {"commit": git_commit(), "cores": len(os.sched_getaffinity(0)), "workers": args.workers}
    append_rows(args.json, [*rows, *fed, *kept], **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
