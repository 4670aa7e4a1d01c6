"""Tokenizing in several processes, its results in order: what preparing text and preparing conversations share."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from parallel.errors import DataError

BATCH_CHARACTERS = 1 << 20
"""Text is sent to a worker process in batches of about so much."""
_THREADS = "TOKENIZERS_PARALLELISM"


@contextmanager
def one_thread() -> Iterator[None]:
    """Switch the tokenizers library's threads off, here and in worker processes that start meanwhile.

    Given one text at a time they only wait for each other, which takes as much of a processor again.
    """
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    prepare(*arguments)


def _leave_with_parent() -> None:
    """A parent that is killed cannot end its workers, and their queue, of which they hold both ends, never closes."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)


def in_order[Batch, Note, Result](
    batches: Iterable[tuple[Batch, Note]],
    work: Callable[[Batch], Result],
    workers: int,
    prepare: Callable[..., None],
    arguments: tuple[Any, ...],
    tokenizer: Path,
) -> Iterator[tuple[Result, Note]]:
    """What worker processes make of each batch, in the order of the batches, with the note that came with it.

    Args:
        work: a module's function, called in a worker.
        prepare: a module's function, called once in each worker with `arguments` before any work.
        tokenizer: for the message.

    Raises:
        DataError: a worker died. What `work` raises comes through.
    """
    # spawn: forking a process that runs tokenizer threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (prepare, arguments)) as pool:
        waiting: deque[tuple[Future[Result], Note]] = deque()
        try:
            ended: Iterator[tuple[Batch, Note] | None] = chain(batches, [None])
            for given in ended:
                if given is not None:
                    waiting.append((pool.submit(work, given[0]), given[1]))
                # A bounded queue: a corpus must not pile up in memory ahead of the workers.
                while waiting and (given is None or len(waiting) > 2 * workers):
                    future, note = waiting.popleft()
                    yield future.result(), note
        except BrokenProcessPool as error:
            raise DataError(
                f"{tokenizer}: a tokenizing process died, most often for want of memory; use fewer --workers."
            ) from error
        finally:
            for future, _ in waiting:
                future.cancel()
