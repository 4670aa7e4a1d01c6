"""What a model is filled from: the tensors of a base under their Hugging Face names, wherever they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from pipeline.storage.safetensors import TensorFact


class WeightSource(Protocol):
    """Tensors by Hugging Face name; `HfCheckpoint` reads them from a folder, a dry run's stand-in makes them up.

    All ranks of a run see one source. Every read gives the stored dtype; on which device is the source's affair.
    """

    folder: Path
    """Where it lies; for messages."""
    facts: dict[str, TensorFact]
    """Name -> shape and dtype."""
    files: tuple[str, ...]
    """Names of the weight files in `folder`; none if nothing lies on a disk."""
    warnings: tuple[str, ...]
    """What the user should know of it, one sentence each."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            CheckpointError: there is none of this name.
        """

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`tensor(name)` restricted to [start, stop) along dim 0 or 1."""

    def block(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor:
        """[start, stop) rows, and columns, of a matrix."""

    def mean_row(self, name: str) -> torch.Tensor:
        """Mean of all stored rows of a matrix [R, H], fp32 [H], the same bits on every rank."""

    def base_hash(self) -> str:
        """Identifies the weights."""
