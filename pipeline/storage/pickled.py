"""Tensors in files of torch.save. A pickle can run code when it is read: `weights_only=True`, or not at all."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel.errors import CheckpointError
from pipeline.storage.lfs import refuse_pointer
from pipeline.storage.safetensors import TensorFact, tensor_digest

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save that holds a dict of tensors and nothing that runs code; mapped, not read.

    Raises:
        CheckpointError: it is no zip file of torch >= 1.6, is damaged, or holds anything else.
    """
    mend = "convert it to .safetensors where you trust it, and give that"
    refuse_pointer(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch tells damage and refusal by half a dozen types, UnpicklingError among them
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path}: is no plain torch.save of tensors, so it is not read ({reason}); {mend}."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and type(v) is torch.Tensor for k, v in found.items()):
        raise CheckpointError(f"{path}: holds other things than named tensors; {mend}.")
    for name, tensor in found.items():
        if tensor.dtype not in PLAIN:
            raise CheckpointError(f"{path}: {name} has dtype {tensor.dtype}, which is not a plain float; {mend}.")
    return found


class PickledFile:
    """A file of torch.save, read as `SafetensorsFile` is.

    Raises:
        CheckpointError: see `read_pickled`.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = read_pickled(path)
        self.facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self.bytes_read = 0
        """Of tensors, since it was opened."""

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, in its stored dtype, in memory of its own."""
        return self._copy(self._tensors[name])

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`tensor(name)` restricted to [start, stop) along dim 0 or 1."""
        return self._copy(self._tensors[name].narrow(dim, start, stop - start))

    def _copy(self, found: torch.Tensor) -> torch.Tensor:
        self.bytes_read += found.nbytes
        return found.clone(memory_format=torch.contiguous_format)

    def digest(self, name: str) -> str:
        """Hex SHA-256 of a tensor's bytes."""
        return tensor_digest(self.tensor(name))
