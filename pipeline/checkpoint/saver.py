"""Saving beside training: a pause for a copy to host memory, then a thread writes; nothing fails silently.

The thread of each rank writes that rank's files and uses no collective. At every step boundary the main threads agree,
in one tiny all-reduce, on whether all are done, whether one failed, and whether a signal asks to stop; when all are
done rank 0 publishes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.axes.pinned import pin, unpin, whole_pages
from parallel.errors import CheckpointError, LongspanError
from parallel.world.collectives import agree
from parallel.world.groups import Groups
from pipeline.checkpoint.manifest import folder_name
from pipeline.checkpoint.writer import PieceArrays, prune, publish, working_folder, write_part
from pipeline.storage.durable import remove


@dataclass(frozen=True)
class StatePiece:
    """A rank's piece of a trained tensor, live: `PieceArrays` with 1-D fp32 tensors on any device."""

    name: str
    shape: tuple[int, ...]
    cut: tuple[int, int, int] | None
    start: int
    stop: int
    state: Mapping[str, torch.Tensor]


@dataclass
class _Job:
    """A save under way."""

    step: int
    manifest: Mapping[str, Any]
    total: int
    """Bytes this rank writes, about."""
    paused_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    written: int = 0
    failure: str | None = None
    thread: threading.Thread | None = None
    keep_all: bool = False
    """No earlier checkpoint is removed for this one."""

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class HostCopy:
    """Host memory for the state this rank keeps, page-locked where there is a GPU; made once and used by every save.

    Args:
        pieces: what will be copied; the same tensors in the same order every time.
    """

    def __init__(self, pieces: Sequence[StatePiece]) -> None:
        self._elements = sum(tensor.numel() for piece in pieces for tensor in piece.state.values())
        # Zeroed, so that its pages are there when the first save needs them.
        size = self._elements * torch.float32.itemsize
        self._flat = whole_pages(size)[:size].view(torch.float32).zero_()
        on_gpu = any(tensor.is_cuda for piece in pieces for tensor in piece.state.values())
        self._registered = bool(on_gpu and self._elements)
        if self._registered:
            # Refused (a limit on locked memory): the copy is slower, not wrong.
            self._registered = pin(self._flat) == 0

    def take(self, pieces: Sequence[StatePiece]) -> list[PieceArrays]:
        """Copy; the arrays are views of the host memory, valid until the next call."""
        place, found = 0, []
        for piece in pieces:
            arrays = {}
            for name, tensor in piece.state.items():
                part = self._flat[place : place + tensor.numel()]
                part.copy_(tensor.detach(), non_blocking=True)
                arrays[name] = part.numpy()
                place += tensor.numel()
            found.append(PieceArrays(piece.name, piece.shape, piece.cut, piece.start, piece.stop, arrays))
        if torch.cuda.is_available() and any(t.is_cuda for piece in pieces for t in piece.state.values()):
            torch.cuda.current_stream().synchronize()
        return found

    def close(self) -> None:
        """Unlock the memory."""
        if self._registered:
            unpin(self._flat)
            self._registered = False


class CheckpointSaver:
    """Saves the checkpoints of one run.

    Args:
        folder: `<output>/checkpoints`.
        groups: every rank writes its own files, rank 0 the manifest.
        keep, keep_every: see `writer.prune`.
        background: write on a thread; False: training waits, and no host copy is held.
        still_ours: called on rank 0 before publishing; raises if another job took the output folder over.
    """

    def __init__(
        self,
        folder: Path,
        groups: Groups,
        keep: int,
        keep_every: int = 0,
        background: bool = True,
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.groups, self.keep, self.keep_every = folder, groups, keep, keep_every
        self.background, self.still_ours = background, still_ours
        self._job: _Job | None = None
        self._host: HostCopy | None = None
        self._publish_failure: str | None = None
        self._publishing = False
        """Rank 0 may still be at it: the others learn of its end when they next agree."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint this process published, or resumed from."""
        self.news: list[str] = []
        """Lines for the display; whoever shows them empties it."""

    def prepare(self, pieces: Sequence[StatePiece]) -> None:
        """Take the host memory now, not in the first save's pause."""
        if self.background:
            self._host = HostCopy(pieces)

    @property
    def progress(self) -> float | None:
        """Share of this rank's bytes the save under way has written; None: none is."""
        return None if self._job is None else min(1.0, self._job.written / max(self._job.total, 1))

    def start(
        self,
        step: int,
        pieces: Sequence[StatePiece],
        rng: Mapping[str, torch.Tensor],
        manifest: Mapping[str, Any],
        keep_all: bool = False,
    ) -> None:
        """Begin the checkpoint of `step`; collective. It is there once `settle` or `wait` says so.

        Args:
            step, pieces, rng, manifest: what it holds.
            keep_all: remove no earlier checkpoint for it: it may prove worthless.

        Raises:
            CheckpointError: an earlier one, waited for first, failed.
        """
        self.wait()
        began = time.perf_counter()
        arrays = self._arrays(pieces)
        random = {name: value.cpu().numpy() for name, value in rng.items()}
        size = sum(array.nbytes for piece in arrays for array in piece.arrays.values())
        job = self._job = _Job(step, manifest, size, keep_all=keep_all)
        if self.background:
            job.thread = threading.Thread(target=self._write, args=(job, arrays, random), name="save", daemon=True)
            job.thread.start()
            job.paused_s = time.perf_counter() - began
            self.news.append(
                f"saving step {step}: {size / 1e6:,.1f} MB of this rank copied in {job.paused_s:.2f} s, writing beside "
                "training"
            )
        else:
            self._write(job, arrays, random)
            job.paused_s = time.perf_counter() - began

    def _arrays(self, pieces: Sequence[StatePiece]) -> list[PieceArrays]:
        if self.background:
            if self._host is None:
                self.prepare(pieces)
            assert self._host is not None
            return self._host.take(pieces)
        return [
            PieceArrays(
                piece.name,
                piece.shape,
                piece.cut,
                piece.start,
                piece.stop,
                {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in piece.state.items()},
            )
            for piece in pieces
        ]

    def _write(self, job: _Job, arrays: Sequence[PieceArrays], rng: Mapping[str, np.ndarray]) -> None:
        def on_bytes(count: int) -> None:
            job.written += count

        try:
            write_part(working_folder(self.folder, job.step), self.groups.env.rank, arrays, rng, on_bytes)
        except BaseException as error:  # on a thread nobody else would hear of it
            job.failure = _reason(error)

    def settle(self, stop: int = 0) -> int:
        """Look after the save under way, at a step boundary; collective.

        Args:
            stop: number of the signal that asks this rank to stop; 0: none.

        Returns:
            The highest number any rank gave.

        Raises:
            CheckpointError: a rank could not write, or rank 0 could not publish; earlier checkpoints are untouched.
        """
        job = self._job
        running = job is not None and job.running
        failure = self._publish_failure
        if job is not None and not running:
            failure = failure or job.failure
        (stop, busy), failed = agree(self.groups, [stop, int(running)], failure)
        self._publishing = False
        if failed is not None:
            self._give_up(failed)
        if job is not None and not busy:
            self._publish(job)
        return stop

    def wait(self) -> None:
        """Until the save under way, if any, is published, and every rank knows it; see `settle` for the errors."""
        # Nor may a save begin while rank 0 publishes: it then removes whatever is unfinished.
        if self._job is None and not self._publishing:
            return
        while self._job is not None:
            if self._job.thread is not None:
                self._job.thread.join()
            self.settle()
        self.settle()

    def _publish(self, job: _Job) -> None:
        self._job = None
        self._publishing = True
        self.saved_step = job.step
        if not self.groups.is_main:
            return
        try:
            self.still_ours()
            final = publish(self.folder, job.step, self.groups.plan.world_size, job.manifest)
        except (OSError, LongspanError, ValueError, KeyError, TypeError) as error:
            self._publish_failure = _reason(error)
            return
        seconds = time.perf_counter() - job.began
        self.news.append(f"saved {final.name} in {seconds:.1f} s, for {job.paused_s:.2f} s of which training paused")
        if job.keep_all:
            return
        # The new one is whole: old ones that stay are no failure.
        try:
            self.news += prune(self.folder, self.keep, self.keep_every)
        except OSError as error:
            self.news.append(f"{self.folder}: old checkpoints could not be looked for ({_reason(error)}).")

    def _give_up(self, reason: str) -> None:
        """Clean up and raise, on every rank."""
        step = self._job.step if self._job is not None else self.saved_step
        self._job = self._publish_failure = None
        final = self.folder / folder_name(step or 0)
        if self.groups.is_main:
            try:
                remove(working_folder(self.folder, step or 0))
            except OSError as error:
                reason += f"; nor could its unfinished folder be removed: {error}"
        raise CheckpointError(
            f"{final}: could not be written ({reason}); free space or fix permissions, and rerun: earlier checkpoints "
            "are untouched."
        )

    def close(self) -> None:
        """Give the host memory back."""
        if self._host is not None:
            self._host.close()
            self._host = None


def _reason(error: BaseException) -> str:
    """One line of an error."""
    if isinstance(error, (OSError, LongspanError)):
        return str(error).rstrip(".")
    return f"{type(error).__name__}: {error}"
