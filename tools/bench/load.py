"""How long weights take from disk into the model: ours, and what libraries take for the same bytes, cold and warm.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parallel.errors import ConfigError, LongspanError
from pipeline.config.paths import model_path, user_path
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.training.run_record import git_commit
from tools.bench.convert import generate, load_rank
from tools.support.bench_rows import append_rows, print_rows

RANKS = 8
"""Of the grids of which one rank is loaded."""
RANK = 3


def device() -> torch.device:
    """Where weights go."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Seconds of `work`, which returns bytes."""
    began = time.perf_counter()
    size = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began, "bytes": size}


def ours(folder: Path, by: str = "") -> dict[str, float]:
    """A rank's `load_base`; by `tp`: its slices, by `zero3`: its share of every matrix, in host memory."""
    found = load_rank(folder, *((RANKS, RANK) if by else (1, 0)), zero3=by == "zero3")
    return {"seconds": found["seconds"], "bytes": found["read"]}


def by_safetensors(folder: Path) -> dict[str, float]:
    """`safetensors.torch.load_file`, every file, kept."""
    from safetensors.torch import load_file

    def work() -> int:
        found = [load_file(folder / file, device=str(device())) for file in HfCheckpoint(folder).files]
        # A mapped page is read when it is looked at.
        return sum(_touched(tensor) for tensors in found for tensor in tensors.values())

    return timed(work)


def by_fastsafetensors(folder: Path) -> dict[str, float]:
    """fastsafetensors' loader, without GPUDirect Storage, every file."""
    library = importlib.import_module("fastsafetensors")

    def work() -> int:
        loader = library.SafeTensorsFileLoader(library.SingleGroup(), str(device()), nogds=True)
        loader.add_filenames({0: [str(folder / file) for file in HfCheckpoint(folder).files]})
        buffers = loader.copy_files_to_device()
        return sum(_touched(buffers.get_tensor(name)) for name in buffers.key_to_rank_lidx)

    return timed(work)


def by_runai(folder: Path) -> dict[str, float]:
    """Run:ai Model Streamer, every file, tensors kept on the device."""
    library = importlib.import_module("runai_model_streamer")

    def work() -> int:
        with library.SafetensorsStreamer() as streamer:
            streamer.stream_files([str(folder / file) for file in HfCheckpoint(folder).files])
            kept = [tensor.to(device(), copy=True) for _, tensor in streamer.get_tensors()]
        return sum(tensor.nbytes for tensor in kept)

    return timed(work)


def hashing(folder: Path) -> dict[str, float]:
    """SHA-256 of every file, as rank 0 makes it at the start of each run."""
    checkpoint = HfCheckpoint(folder)

    def work() -> int:
        checkpoint.digests()
        return sum(fact.nbytes for fact in checkpoint.facts.values())

    return timed(work)


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, with an element of every page read."""
    if tensor.device.type == "cpu":
        tensor.view(-1).view(torch.uint8)[:: os.sysconf("SC_PAGESIZE")].sum()
    return tensor.nbytes


WAYS: dict[str, Callable[[Path], dict[str, float]]] = {
    "ours, whole": ours,
    f"ours, rank {RANK} of TP {RANKS}": partial(ours, by="tp"),
    f"ours, rank {RANK} of {RANKS}, zero3 offload": partial(ours, by="zero3"),
    "ours, SHA-256 of the files": hashing,
    "safetensors load_file": by_safetensors,
    "fastsafetensors": by_fastsafetensors,
    "runai_model_streamer": by_runai,
}


def drop_pages(folder: Path) -> None:
    """Have the kernel forget what it keeps of the weight files."""
    for file in HfCheckpoint(folder).files:
        descriptor = os.open(folder / file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(way: str, folder: Path) -> dict[str, float]:
    """One way in a process of its own.

    Raises:
        LongspanError: it failed.
    """
    words = [sys.executable, "-W", "ignore", "-m", "tools.bench.load", "--child", way, "--model", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise LongspanError(f"{way}: left with code {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def ways_with(words: Sequence[str]) -> list[str]:
    """Names of the ways that are installed and have one of the words; no words: all.

    Raises:
        ConfigError: none has.
    """
    ways = [way for way in WAYS if " " in way or importlib.util.find_spec(way)]
    found = [way for way in ways if not words or any(word in way for word in words)]
    if not found:
        raise ConfigError(f"--only: no way here has {' or '.join(words)} in its name; there are: {'; '.join(ways)}.")
    return found


def run(folder: Path, rounds: int, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Every way, cold and then warm, in turn, `rounds` times; medians."""
    found: dict[tuple[str, str], list[float]] = {}
    sizes = dict[str, float]()
    for _ in range(rounds):
        for way in ways:
            drop_pages(folder)
            for state in ("cold", "warm"):
                taken = measure(way, folder)
                sizes[way] = taken["bytes"]
                found.setdefault((way, state), []).append(taken["seconds"])
                print(json.dumps({"way": way, "state": state, **taken}), file=sys.stderr, flush=True)
    rows = []
    for way in ways:
        row: dict[str, Any] = {"way": way, "GB": sizes[way] / 1e9}
        for state in ("cold", "warm"):
            seconds = statistics.median(found[way, state])
            row |= {f"{state} s": seconds, f"{state} GB/s": sizes[way] / 1e9 / seconds}
        rows.append(row)
    return rows


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Generate unless given, measure, print; returns the exit status."""
    parser = Parser("tools.bench.load", __doc__, "BENCHES.md")
    parser.add_argument("--gb", type=float, default=8.0, help="size of the model that is made, 10^9 bytes")
    parser.add_argument("--model", type=model_path, help="a checkpoint folder; none is made")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="ways whose names have one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=user_path, help="also append the rows here, one line each")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(WAYS[args.child](args.model)))
        return 0
    ways = ways_with(args.only)
    made = Path(tempfile.mkdtemp(prefix="load-")) if args.model is None else None
    try:
        if made is not None:
            generate(made, args.gb)
        rows = run(args.model or made / "base", args.rounds, ways)  # type: ignore[operator]
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    print_rows(rows, f"Weights into {device().type}, {os.cpu_count()} CPUs, commit {git_commit()}", 160)
    append_rows(args.json, rows, commit=git_commit(), device=str(device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
