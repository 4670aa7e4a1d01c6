"""Random weights that stand in for a checkpoint, made where and when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.planning.arch import LlamaArch
from pipeline.planning.tensors import hf_tensor_shapes
from pipeline.storage.safetensors import TensorFact


class RandomBase:
    """A `WeightSource` that nobody has to download: normal, deviation 0.02; norms one; on the GPU if there is one."""

    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __init__(self, arch: LlamaArch, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder = Path("random")
        self.facts = {name: TensorFact(shape, dtype) for name, shape in hf_tensor_shapes(arch).items()}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _make(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        values = torch.empty(tuple(shape), dtype=self.facts[name].dtype, device=self._device)
        return values.fill_(1.0) if "norm" in name else values.normal_(0.0, 0.02)

    def tensor(self, name: str) -> torch.Tensor:
        """Fresh values on every call."""
        return self._make(name, self.facts[name].shape)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Fresh values of that range's shape."""
        shape = list(self.facts[name].shape)
        shape[dim] = stop - start
        return self._make(name, shape)

    def block(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Fresh values of that block's shape."""
        first, last = columns or (0, self.facts[name].shape[1])
        return self._make(name, (rows[1] - rows[0], last - first))

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.facts)

    def mean_row(self, name: str) -> torch.Tensor:
        """What the mean of many such rows is near: zero."""
        return torch.zeros(self.facts[name].shape[1])

    def base_hash(self) -> str:
        """Not a hash: nothing can be resumed from this."""
        return "random"
