"""How fast text becomes tokens and tokens become batches, and what a million samples do to the memory.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

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
from statistics import median
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from parallel.errors import DataError
from pipeline.config.paths import model_path, user_path
from pipeline.data.chat import ChatTemplate
from pipeline.data.conversations import conversation_of
from pipeline.data.loader import TrainLoader
from pipeline.data.mixed import MixedWindows
from pipeline.data.packing import PackedDataset
from pipeline.data.prepare import prepare
from pipeline.data.prepare_chat import prepare_chat
from pipeline.data.records import RecordReader
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.shards import TokenShards, open_shards
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.training.run_record import git_commit
from tools.init import SHIPPED
from tools.support.bench_rows import append_rows, print_rows

ROUNDS = 7
KINDS = {"short records": 200, "chapters": 20_000, "one text": None}
"""Characters of a document; None: all of them."""
TURNS, TURN = 6, 200
"""Of a conversation, and characters of each."""
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


def characters_of(text: Path, wanted: int) -> str:
    """So much text, read again and again, cut elsewhere each time."""
    whole = "".join(document.text for document in RecordReader(text))
    turns = (whole[997 * turn % len(whole) :] for turn in itertools.count())
    found = ""
    while len(found) < wanted:
        found += next(turns)[: wanted - len(found)]
    return found


def compared(
    what: str, characters: int, ours: Callable[[int], object], library: Callable[[], object]
) -> dict[str, Any]:
    """The row of two ways to the same tokens, turn by turn; `ours` is given the round."""
    rounds = []
    for turn in range(ROUNDS):
        first, second = measured(library), measured(lambda turn=turn: ours(turn))  # type: ignore[misc]
        rounds.append((*first, *second))
    clock, processor, own_clock, own_processor = zip(*rounds, strict=True)
    ratios = [theirs / own for theirs, own in zip(processor, own_processor, strict=True)]
    return {
        "what": what,
        "M characters": characters / 1e6,
        "M characters/s": characters / median(own_clock) / 1e6,
        "the library's": characters / median(clock) / 1e6,
        "of its pace by processor time": median(ratios),
        "least": min(ratios),
        "greatest": max(ratios),
        "by the clock": median(theirs / own for theirs, own in zip(clock, own_clock, strict=True)),
    }


def tokenizing(folder: Path, text: Path, megabytes: float, workers: int) -> list[dict[str, Any]]:
    """Characters a second of preparing and of the library alone, a row a kind of text."""
    tokenizer = load_tokenizer(folder)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = characters_of(text, int(megabytes * 1e6))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for kind, size in KINDS.items():
            documents = [
                whole[start : start + (size or len(whole))] for start in range(0, len(whole), size or len(whole))
            ]
            source = place / ("text.txt" if size is None else "text.jsonl")
            records = whole if size is None else "".join(json.dumps({"text": each}) + "\n" for each in documents)
            source.write_text(records, encoding="utf-8")

            def library(documents: list[str] = documents) -> None:
                for start in range(0, len(documents), 64):
                    alone.encode_batch_fast(documents[start : start + 64], add_special_tokens=False)

            def ours(turn: int, source: Path = source, kind: str = kind) -> None:
                prepare(source, place / f"{kind}-{turn}", tokenizer, workers=workers)

            rows.append(compared(kind, len(whole), ours, library))
        try:
            template = ChatTemplate(tokenizer)
        except DataError:
            return rows  # none can be read
        if template.source is not None:
            rows.append(_conversations(template, whole, place, workers))
    return rows


def _conversations(template: ChatTemplate, whole: str, place: Path, workers: int) -> dict[str, Any]:
    turns = [whole[start : start + TURN].strip() or "-" for start in range(0, len(whole), TURN)]
    roles = itertools.cycle(("user", "assistant"))
    told = [dict(zip(("role", "content"), each, strict=True)) for each in zip(roles, turns, strict=False)]
    records = [{"messages": told[start : start + TURNS]} for start in range(0, len(told) - TURNS + 1, TURNS)]
    source = place / "chat.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    texts = [template.text_of(conversation_of(record)) for record in records]

    def library() -> None:
        for start in range(0, len(texts), 64):
            template.encoder.encode_batch(texts[start : start + 64], add_special_tokens=False)

    return compared(
        "conversations",
        sum(map(len, texts)),
        lambda turn: prepare_chat(source, place / f"chat-{turn}", template, None, workers=workers),
        library,
    )


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
    parser = Parser("tools.bench.data", __doc__, "BENCHES.md")
    parser.add_argument("--tokenizer", type=model_path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--text", type=user_path, default=SHIPPED / "demo/train", help="default: the demo's novel")
    parser.add_argument("--megabytes", type=float, default=2, help="of text to tokenize (default: %(default)s)")
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
