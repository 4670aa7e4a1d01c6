"""Training batches as torch tensors, prepared one step ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.packing import Windows
from pipeline.data.sampler import rank_indices


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU (pinned where CUDA is present); B sequences of S tokens."""

    tokens: torch.Tensor
    """int64 [B, S]."""
    labels: torch.Tensor
    """The next token at every position, -100 where there is no loss; int64 [B, S]."""
    document_ids: torch.Tensor | None
    """Document of every token, non-decreasing along S, int32 [B, S]; None where documents are not masked."""


class TrainLoader:
    """The micro-batches of one data-parallel rank, by optimizer step.

    While a step trains, one background thread prepares the next. An exception there is raised by the `step` that asks
    for its result.

    Args:
        dataset: windows of text or of conversations.
        seed: of the order.
        global_batch: sequences an optimizer step over all ranks.
        micro_batch: sequences a forward pass.
        rank: data-parallel rank.
        world: data-parallel ranks.
        mask_documents: give document ids, and no label across a document's end.

    Raises:
        ConfigError: global_batch is not a multiple of world * micro_batch.
    """

    def __init__(
        self,
        dataset: Windows,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        mask_documents: bool,
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world = world
        self._mask_documents = mask_documents
        self._start = (0, 0)
        self._pin = torch.cuda.is_available()
        rank_indices(np.arange(global_batch), rank, world, micro_batch)  # refuse a bad split now, not in the thread
        self._executor: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None
        self._last: tuple[int, list[Batch]] | None = None

    @property
    def windows(self) -> int:
        """Windows the data hold; a step draws `global_batch` of them."""
        return len(self._dataset)

    @property
    def dataset(self) -> Windows:
        """Where they come from."""
        return self._dataset

    def begin_at(self, step: int, read: int) -> None:
        """Go on from optimizer step `step` with `read` sequences read before it, before any step is asked for."""
        if self._ahead is not None:
            raise RuntimeError("the loader has begun")
        self._start = (step, read)

    def step(self, step: int) -> list[Batch]:
        """Micro-batches of this rank for 0-based optimizer step `step`, in order; any step may be asked for.

        The last one that was asked for is not read again: a step may be computed twice.

        Raises:
            DataError: the shards hold an id outside the vocabulary.
            RuntimeError: the loader is closed.
        """
        if self._executor is None:
            raise RuntimeError("the loader is closed")
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._make(step)
        self._last = (step, batches)
        self._ahead = (step + 1, self._executor.submit(self._make, step + 1))
        return batches

    def close(self) -> None:
        """Stop the background thread; closing twice is fine."""
        executor, self._executor = self._executor, None
        self._ahead = self._last = None
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, step: int) -> list[Batch]:
        start, read = self._start
        first = read + (step - start) * self._global_batch
        indices = self._dataset.order(self._seed, first, self._global_batch)
        parts = rank_indices(indices, self._rank, self._world, self._micro_batch)
        return [self._batch(part.tolist()) for part in parts]

    def _batch(self, indices: list[int]) -> Batch:
        windows = [self._dataset.window(index, self._mask_documents) for index in indices]
        documents = np.stack([window.document_ids for window in windows]) if self._mask_documents else None
        return Batch(
            tokens=self._tensor(np.stack([window.tokens for window in windows])),
            labels=self._tensor(np.stack([window.labels for window in windows])),
            document_ids=None if documents is None else self._tensor(documents),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin else tensor
