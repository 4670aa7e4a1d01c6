"""Tensors read by several threads are safetensors' own, and a file that ends too soon is told whoever met its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.errors import CheckpointError
from pipeline.storage import safetensors


@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_threads_read_what_safetensors_reads(readers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "READERS", readers)
    monkeypatch.setattr(safetensors, "SHARED_READ", 1000)
    monkeypatch.setattr(safetensors, "BLOCK", 300)
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(readers)
    shapes = {"odd": (97, 31), "small": (5,), "even": (64, 64)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)
    wanted = load_file(path)
    file = safetensors.SafetensorsFile(path)
    for name, tensor in wanted.items():
        assert torch.equal(file.tensor(name), tensor)
    assert torch.equal(file.slice("odd", 0, 13, 90), wanted["odd"][13:90])
    assert file.bytes_read == sum(tensor.nbytes for tensor in wanted.values()) + 77 * 31 * 4

    told: list[tuple[int, int]] = []
    monkeypatch.setattr(safetensors, "READ_AHEAD", 1000)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: told.append((start, start + size)))
    assert torch.equal(file.slice("odd", 1, 3, 9), wanted["odd"][:, 3:9])
    # All of the matrix, in steps that the kernel honours.
    begins, ends = zip(*told, strict=True)
    assert begins == (file._offsets["odd"], *ends[:-1]) and ends[-1] - begins[0] == wanted["odd"].nbytes
    assert max(end - begin for begin, end in told) == 1000

    size = path.stat().st_size
    os.truncate(path, size - 50)
    last = max(wanted, key=lambda name: file._offsets[name])
    with pytest.raises(CheckpointError, match=f"{last} cannot be read .the file became shorter.; check the disk"):
        file.tensor(last)
