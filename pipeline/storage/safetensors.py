"""One safetensors file, read and written in pieces of bounded size; nothing is executed and nothing is mapped.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range) and the
bytes. Reading is `pread` into fresh memory: what a process holds is what it asked for, where mapped pages would count
as its own until the kernel takes them back.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.errors import CheckpointError
from pipeline.storage.lfs import refuse_pointer
from pipeline.storage.safetensors_header import layout

MAX_HEADER = 100_000_000
"""Bytes; the format's own limit, so that a damaged length cannot ask for terabytes."""
BLOCK = 1 << 25
"""Bytes read, hashed or written at a time."""
READERS = min(8, os.cpu_count() or 1)
"""Threads that fill one tensor: a disk and the kernel's copying want several reads under way."""
SHARED_READ = 1 << 24
"""Bytes of a tensor for each of them."""
READ_AHEAD = 1 << 17
"""Bytes: Linux's read_ahead_kb as shipped. It reads no more ahead at a time, whatever it is asked."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating dtypes weights come in; integer or fp8 weights are quantized models, which are refused."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFact:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def empty(self) -> torch.Tensor:
        """Such a tensor on the CPU, in memory of its own, its contents undefined."""
        return torch.empty(self.shape, dtype=self.dtype)


def _parse_header(path: Path) -> tuple[dict[str, TensorFact], dict[str, int]]:
    """Facts and absolute byte offsets of every tensor; see `read_header` for the errors."""
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        facts, offsets = {}, {}
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {entry['dtype']}, which is not a plain float; use the bf16, fp16 or "
                    "fp32 release of this model."
                )
            facts[name] = TensorFact(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            start, stop = entry["data_offsets"]
            if stop - start != facts[name].nbytes:
                raise ValueError(f"{name} has {stop - start} bytes instead of {facts[name].nbytes}")
            offsets[name] = 8 + length + start
        ends = {name: offsets[name] + facts[name].nbytes for name in facts}
        need = max(ends.values(), default=8 + length)
        if need != size:
            cut = [name for name in sorted(ends, key=lambda name: ends[name]) if ends[name] > size]
            where = f", cut off in {cut[0]}" if cut else ""
            raise ValueError(f"it has {size} bytes instead of {need}{where}")
        # Overlapping or gapped ranges would let a damaged header read as another tensor.
        if sum(fact.nbytes for fact in facts.values()) != size - 8 - length:
            raise ValueError("its tensors do not tile the file")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; download the checkpoint again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error}); download it again.") from None
    return facts, offsets


def read_header(path: Path) -> dict[str, TensorFact]:
    """Tensors a safetensors file declares, after checking that their bytes are all there.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or holds a dtype that is not a plain float.
    """
    return _parse_header(path)[0]


class SafetensorsFile:
    """An open safetensors file; stays readable when it is unlinked or renamed meanwhile.

    Args:
        memory: gives an uninitialised tensor on the CPU for what is read.

    Raises:
        CheckpointError: see `read_header`.
    """

    def __init__(self, path: Path, memory: Callable[[TensorFact], torch.Tensor] = TensorFact.empty) -> None:
        self.path, self._memory = Path(path), memory
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            self._descriptor = -1
        self.facts, self._offsets = _parse_header(self.path)
        self.bytes_read = 0
        """Of tensors, since it was opened."""

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def _fill(self, name: str, buffer: memoryview, offset: int) -> None:
        readers = min(READERS, len(buffer) // SHARED_READ)
        try:
            if readers < 2:
                self._read_all(buffer, offset)
            else:
                share = -(-len(buffer) // readers)
                starts = range(0, len(buffer), share)
                with ThreadPoolExecutor(readers) as pool:
                    for _ in pool.map(lambda at: self._read_all(buffer[at : at + share], offset + at), starts):
                        pass
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error}); check the disk, and rerun.") from None
        self.bytes_read += len(buffer)

    def _read_all(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done : done + BLOCK]], offset + done)
            if not count:
                raise OSError("the file became shorter")
            done += count

    def _announce(self, start: int, size: int) -> None:
        """Have the kernel read ahead: a short read from every row looks random, and each would wait for its page."""
        for at in range(start, start + size, READ_AHEAD):
            os.posix_fadvise(self._descriptor, at, min(READ_AHEAD, start + size - at), os.POSIX_FADV_WILLNEED)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, in its stored dtype, on the CPU, in memory of its own unless `memory` says otherwise."""
        fact = self.facts[name]
        return self._rows(name, fact, 0, fact.shape[0]) if fact.shape else self._read(name, fact, 0)

    def _read(self, name: str, fact: TensorFact, skip: int) -> torch.Tensor:
        """`fact` bytes of a tensor, from `skip` bytes into it."""
        found = self._memory(fact)
        if fact.nbytes:
            raw = memoryview(found.reshape(-1).view(torch.uint8).numpy())
            self._fill(name, raw, self._offsets[name] + skip)
        return found

    def _rows(self, name: str, fact: TensorFact, start: int, stop: int) -> torch.Tensor:
        row = fact.nbytes // fact.shape[0] if fact.shape[0] else 0
        return self._read(name, TensorFact((stop - start, *fact.shape[1:]), fact.dtype), start * row)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`tensor(name)` restricted to [start, stop) along dim 0 or 1; only those bytes are read.

        Raises:
            CheckpointError: the range leaves the tensor.
        """
        fact = self.facts[name]
        if not (0 <= dim < min(len(fact.shape), 2) and 0 <= start < stop <= fact.shape[dim]):
            raise CheckpointError(f"{name}: shape {fact.shape} has no range {start}:{stop} along dim {dim}.")
        if dim == 0:
            return self._rows(name, fact, start, stop)
        found = self._memory(TensorFact((fact.shape[0], stop - start, *fact.shape[2:]), fact.dtype))
        row = fact.nbytes // fact.shape[0]
        part = row // fact.shape[1]
        self._announce(self._offsets[name], fact.nbytes)
        raw = memoryview(found.reshape(-1).view(torch.uint8).numpy())
        width = part * (stop - start)
        for number in range(fact.shape[0]):
            where = self._offsets[name] + number * row + part * start
            self._fill(name, raw[number * width : (number + 1) * width], where)
        return found

    def digest(self, name: str) -> str:
        """Hex SHA-256 of a tensor's bytes; memory holds one block."""
        fact, done, found = self.facts[name], 0, hashlib.sha256()
        while done < fact.nbytes:
            size = min(BLOCK, fact.nbytes - done)
            buffer = bytearray(size)
            self._fill(name, memoryview(buffer), self._offsets[name] + done)
            found.update(buffer)
            done += size
        return found.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as they lie (numpy has no bfloat16)."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def tensor_digest(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor.detach().cpu().contiguous())).hexdigest()


@dataclass(frozen=True)
class Written:
    """A file just written."""

    sha256: str
    """Of the file."""
    nbytes: int
    """Of the file."""
    tensors: dict[str, str]
    """Name -> SHA-256 of its bytes."""


def write_safetensors(
    path: Path,
    facts: Mapping[str, TensorFact],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write one file tensor by tensor, never holding two; synced, under a temporary name until it is whole.

    Args:
        on_bytes: told of every tensor's bytes when they are written.

    Raises:
        CheckpointError: `read` gave a tensor other than announced, or the disk refused.
    """
    entries = {name: (_CODES[fact.dtype], fact.shape, fact.dtype.itemsize, fact.nbytes) for name, fact in facts.items()}
    header, order = layout(entries, {"format": "pt", **metadata})
    temporary = path.with_name(f".{path.name}.tmp")
    whole, digests = hashlib.sha256(header), {}
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for name in order:
                tensor = read(name).detach().to(device="cpu").contiguous()
                if TensorFact(tuple(tensor.shape), tensor.dtype) != facts[name]:
                    raise CheckpointError(
                        f"{path}: {name} came as {tuple(tensor.shape)} {tensor.dtype}, announced as {facts[name]}."
                    )
                raw, one = raw_bytes(tensor), hashlib.sha256()
                for start in range(0, len(raw), BLOCK):
                    block = raw[start : start + BLOCK]
                    file.write(block)
                    one.update(block)
                    whole.update(block)
                digests[name] = one.hexdigest()
                on_bytes(len(raw))
                del tensor, raw
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); free space or fix permissions, and rerun."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return Written(whole.hexdigest(), len(header) + sum(fact.nbytes for fact in facts.values()), digests)
