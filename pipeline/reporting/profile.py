"""Where a step's time goes on the GPU: its kernels, how busy each stream is, and what the computing one waits for."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.reporting.lasting import Warn, optional_file, to_stderr

FOLDER = "profile"
"""In a run's output."""
ROWS = 40
"""Operations listed."""
BLOCKS = 200_000
"""Allocations remembered for the picture of the memory."""

KINDS = {
    "copies between host and GPU": ("Memcpy HtoD", "Memcpy DtoH"),
    "sent": ("nccl",),
    "attention": ("flash", "sdpa", "fmha", "cudnn_generated", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "wgmma", "cublas", "splitk"),
}
"""Kind -> parts of kernels' names, the first that fits; what fits none is pointwise work."""


class Kernel(NamedTuple):
    """One kernel or copy on one stream."""

    name: str
    stream: int
    start: int
    """Nanoseconds."""
    stop: int


def kind_of(name: str) -> str:
    """Which of KINDS a kernel is, by its name."""
    lower = name.lower()
    found = (kind for kind, parts in KINDS.items() if any(part.lower() in lower for part in parts))
    return next(found, "pointwise and other")


def busy(kernels: Iterable[Kernel]) -> int:
    """Nanoseconds in which at least one of them runs."""
    total, until = 0, 0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0, kernel.stop - max(kernel.start, until))
        until = max(until, kernel.stop)
    return total


def summary(kernels: list[Kernel]) -> list[str]:
    """Lines: the whole time, each stream's busy time by kind, and how long the busiest one stood still."""
    if not kernels:
        return ["no kernel ran"]
    whole = max(kernel.stop for kernel in kernels) - min(kernel.start for kernel in kernels)
    streams: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        streams[kernel.stream].append(kernel)
    lines = [f"first to last kernel: {whole / 1e6:.1f} ms"]
    for stream, own in sorted(streams.items(), key=lambda item: -busy(item[1])):
        kinds: dict[str, int] = defaultdict(int)
        for kernel in own:
            kinds[kind_of(kernel.name)] += kernel.stop - kernel.start
        parts = ", ".join(f"{kind} {time / 1e6:.1f}" for kind, time in sorted(kinds.items(), key=lambda item: -item[1]))
        time = busy(own)
        lines.append(f"stream {stream}: busy {time / 1e6:.1f} ms, idle {(whole - time) / 1e6:.1f} ms; {parts}")
    return lines


def _kernels(profiler: torch.profiler.profile) -> list[Kernel]:
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None, "it has run"
    results = profiler.profiler.kineto_results
    cuda = torch.autograd.DeviceType.CUDA
    return [
        Kernel(event.name(), event.device_resource_id(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.device_type() == cuda and not event.name().startswith("Memset")
    ]


def _page(profiler: torch.profiler.profile) -> str:
    """Operations by the time they take, and on a GPU what its streams do."""
    on_gpu = torch.cuda.is_available()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = str(profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=70))
    return "\n".join([table, *(summary(_kernels(profiler)) if on_gpu else ())])


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """What the recorder's own writers raise, as any failure to write."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error


class StepProfile:
    """Records one optimizer step of this process.

    In `folder`: `*.trace.json.gz` for Perfetto or chrome://tracing; `*.txt`, a page that sums it up; on a GPU
    `*.memory.pickle` for pytorch.org/memory_viz. What cannot be written is said, and training goes on.

    Args:
        folder: where to write.
        rank: this process.
        number: which step of this process's session, from 1.
    """

    def __init__(self, folder: Path, rank: int, number: int, warn: Warn = to_stderr) -> None:
        self._folder, self._rank, self._left, self._warn = folder, rank, number, warn
        self._recorded: tuple[int, float, torch.profiler.profile] | None = None

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Within, optimizer step `step` (from 1) runs; recorded if it is the one asked for: then call `write`."""
        self._left -= 1
        if self._left:
            yield
            return
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=BLOCKS)
        profiler = torch.profiler.profile(profile_memory=True, acc_events=True)
        profiler.start()
        began = time.perf_counter()
        try:
            yield
            if on_gpu:
                torch.cuda.synchronize()
        except BaseException:
            self._stop(profiler)
            raise
        self._recorded = step, time.perf_counter() - began, profiler

    @property
    def recorded(self) -> bool:
        """Whether a step waits to be written."""
        return self._recorded is not None

    def write(self) -> None:
        """Write the recorded step, which takes seconds to minutes; nothing if there is none."""
        if self._recorded is None:
            return
        (step, seconds, profiler), self._recorded = self._recorded, None
        base = self._folder / f"step-{step:06d}-rank-{self._rank}"
        try:
            profiler.stop()
            with optional_file(base, self._warn), _as_os_error():
                self._folder.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(f"{base}.trace.json.gz")
                Path(f"{base}.txt").write_text(
                    f"step {step}, rank {self._rank}: {seconds:.3f} s while recorded\n{_page(profiler)}\n"
                )
                if torch.cuda.is_available():
                    torch.cuda.memory._dump_snapshot(f"{base}.memory.pickle")
        finally:
            self._stop(None)

    def _stop(self, profiler: torch.profiler.profile | None) -> None:
        """Record nothing more."""
        if profiler is not None:
            profiler.stop()
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)


def print_profile(work: Callable[[], object], shown: bool) -> None:
    """Run `work` once more and, where `shown`, print its kernels by time; every rank calls it, so that none waits."""
    with torch.profiler.profile() as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if shown:
        print(_page(profiler), flush=True)
