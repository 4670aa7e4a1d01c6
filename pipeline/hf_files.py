"""Hugging Face checkpoint folders: checked lazy reading, streaming writing. safetensors and JSON only: nothing is
executed.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range) and the
bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from parallel.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit, so that a damaged length cannot ask for terabytes."""
SHARD_BYTES = 4_000_000_000
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


def read_header(path: Path) -> dict[str, TensorFact]:
    """Tensors a safetensors file declares, after checking that their bytes are all there.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or holds a dtype that is not a plain float.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        need = 8 + length + max(ends, default=0)
        if need != size:
            raise ValueError(f"it has {size} bytes instead of {need}")
        facts = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {entry['dtype']}, which is not a plain float; use the bf16, fp16 or "
                    "fp32 release of this model."
                )
            facts[name] = TensorFact(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            start, stop = entry["data_offsets"]
            if stop - start != facts[name].nbytes:
                raise ValueError(f"{name} has {stop - start} bytes instead of {facts[name].nbytes}")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; download the checkpoint again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error}); download it again.") from None
    return facts


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """File name -> tensors the index puts there (None: no index)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; give a Hugging Face checkpoint folder.")
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            wanted: dict[str, set[str] | None] = {}
            for name, file in weight_map.items():
                if Path(file).name != file:
                    raise ValueError(f"{name} lies outside the folder, in {file!r}")
                members = wanted.setdefault(file, set())
                assert members is not None
                members.add(name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: is not a usable index ({error}); download it again.") from None
        missing = sorted(file for file in wanted if not (folder / file).is_file())
        if missing:
            raise CheckpointError(
                f"{folder / missing[0]}: is missing ({len(missing)} of {len(wanted)} shards are); download it again."
            )
        return wanted
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if "adapter_model.safetensors" in files:
        raise CheckpointError(f"{folder}: is a PEFT adapter, not a model; give the folder of its base model.")
    if files:
        raise CheckpointError(f"{index}: is missing, though {files[0]} is there; download the index too.")
    if list(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder}: holds a GGUF file only; convert it first with python -m tools.import_hf.")
    if list(folder.glob("*.bin")) + list(folder.glob("*.pth")) + list(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder}: holds pickled weights only, which can run code when read and are never opened here; download "
            "the safetensors release, or convert them with safetensors' convert tool."
        )
    raise CheckpointError(f"{folder}: holds no *.safetensors file; give a Hugging Face checkpoint folder.")


class HfCheckpoint:
    """A folder of safetensors, single or sharded, opened lazily; tensors are memory-mapped.

    Raises:
        CheckpointError: the index or a shard is missing, truncated or disagrees with the other; the file is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.facts: dict[str, TensorFact] = {}
        """Name -> shape and dtype."""
        self._file: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._hash: str | None = None
        shards = _shards(self.folder)
        self.files = tuple(sorted(shards))
        """Names of the weight files."""
        for file, indexed in sorted(shards.items()):
            facts = read_header(self.folder / file)
            absent = sorted((indexed or set()) - facts.keys())
            if absent:
                raise CheckpointError(
                    f"{self.folder / file}: lacks {absent[0]}, which the index puts there; download it again."
                )
            for name in facts if indexed is None else indexed:
                self.facts[name], self._file[name] = facts[name], file

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.facts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes have."""
        weight: dict[torch.dtype, int] = {}
        for fact in self.facts.values():
            weight[fact.dtype] = weight.get(fact.dtype, 0) + fact.nbytes
        return max(weight, key=lambda dtype: weight[dtype])

    def _handle(self, name: str) -> Any:
        if name not in self._file:
            raise CheckpointError(f"{self.folder}: has no tensor {name}; the weights do not fit its config.json.")
        file = self._file[name]
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error}); download it again.") from None
        return self._open[file]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, in its stored dtype, on the CPU.

        Raises:
            CheckpointError: there is none of this name.
        """
        tensor: torch.Tensor = self._handle(name).get_tensor(name)
        return tensor

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`tensor(name)` restricted to [start, stop) along dim 0 or 1; only those bytes are read.

        Raises:
            CheckpointError: there is none of this name, or the range leaves it.
        """
        whole = self._handle(name).get_slice(name)
        shape = self.facts[name].shape
        if not (0 <= dim < min(len(shape), 2) and 0 <= start < stop <= shape[dim]):
            raise CheckpointError(f"{name}: shape {shape} has no range {start}:{stop} along dim {dim}.")
        part: torch.Tensor = whole[start:stop] if dim == 0 else whole[:, start:stop]
        return part

    def block(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor:
        """[start, stop) rows, and columns, of a matrix; only those rows' bytes are read."""
        whole = self._handle(name).get_slice(name)
        first, last = columns or (0, self.facts[name].shape[1])
        part: torch.Tensor = whole[rows[0] : rows[1], first:last]
        return part

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignore: Callable[[str], bool] = lambda name: False) -> None:
        """Compare with the tensors config.json implies (`names.hf_tensor_shapes`).

        An `lm_head.weight` beside tied embeddings is accepted when it equals them.

        Raises:
            CheckpointError: a tensor is missing, misshaped or unknown; the file and tensor are named.
        """
        for name, shape in shapes.items():
            if name not in self.facts:
                raise CheckpointError(f"{self.folder}: has no tensor {name}; the weights do not fit its config.json.")
            if self.facts[name].shape != tuple(shape):
                raise CheckpointError(
                    f"{self.folder / self._file[name]}: {name} has shape {self.facts[name].shape}, but config.json "
                    f"describes {tuple(shape)}; the two files belong to different models."
                )
        for name in self.names:
            if name in shapes or ignore(name):
                continue
            embedding = "model.embed_tokens.weight"
            if name == "lm_head.weight" and embedding in self.facts:
                if self.facts[name] == self.facts[embedding] and torch.equal(self.tensor(name), self.tensor(embedding)):
                    continue
                raise CheckpointError(
                    f"{self.folder / self._file[name]}: lm_head.weight differs from the embedding although config.json "
                    "ties them; set tie_word_embeddings to false there."
                )
            raise CheckpointError(
                f"{self.folder / self._file[name]}: {name} is not a tensor of the model config.json describes; the two "
                "files belong to different models."
            )

    def base_hash(self) -> str:
        """SHA-256 over the sorted SHA-256 of every weight file: identifies the weights; reads them all, once a
        process."""
        if self._hash is None:
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                digests = sorted(pool.map(_file_digest, (self.folder / file for file in self.files)))
            self._hash = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        return self._hash


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_shards(facts: Mapping[str, TensorFact], max_bytes: int) -> list[list[str]]:
    """Names of each shard: in the given order, as many as fit `max_bytes`; a larger tensor stands alone."""
    shards: list[list[str]] = []
    room = 0
    for name, fact in facts.items():
        if not shards or fact.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= fact.nbytes
    return shards


def write_safetensors(
    path: Path, facts: Mapping[str, TensorFact], read: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one file tensor by tensor, never holding two; synced, under a temporary name until it is whole.

    Raises:
        CheckpointError: `read` gave a tensor other than announced, or the disk refused.
    """
    # Widest elements first keeps every tensor aligned to its element size, which readers that map the file rely on.
    order = sorted(facts, key=lambda name: -facts[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in order:
        fact = facts[name]
        end = offset + fact.nbytes
        header[name] = {"dtype": _CODES[fact.dtype], "shape": list(fact.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                tensor = read(name).detach().to(device="cpu").contiguous()
                if TensorFact(tuple(tensor.shape), tensor.dtype) != facts[name]:
                    raise CheckpointError(
                        f"{path}: {name} came as {tuple(tensor.shape)} {tensor.dtype}, announced as {facts[name]}."
                    )
                # numpy has no bfloat16: hand the bytes over as they lie.
                file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); free space or fix permissions, and rerun."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors_sharded(
    folder: Path,
    facts: Mapping[str, TensorFact],
    read: Callable[[str], torch.Tensor],
    max_shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write a model's weights as Hugging Face shards with an index (a single file when it fits); returns the file
    names.

    Args:
        facts: announced tensors, in the order shards are filled.
        read: gives a tensor when its turn comes (in no particular order), so that memory holds one at a time.

    Raises:
        CheckpointError: the disk is too full (found out first), or refused.
    """
    check_space(folder, sum(fact.nbytes for fact in facts.values()))
    shards = plan_shards(facts, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, facts, read, {})
        return [SINGLE]
    weight_map: dict[str, str] = {}
    files = []
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: facts[name] for name in shard}, read, {})
        weight_map |= dict.fromkeys(shard, file)
        files.append(file)
    total = sum(fact.nbytes for fact in facts.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, INDEX]


def check_space(folder: Path, need: int) -> None:
    """Refuse to start writing `need` bytes where they do not fit.

    Raises:
        CheckpointError: naming both amounts.
    """
    free = shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{folder}: needs {need / 2**30:.1f} GiB and the disk has {free / 2**30:.1f}; free space or choose another "
            "output."
        )


@contextmanager
def new_folder(output: Path, force: bool) -> Iterator[Path]:
    """Give a temporary folder beside `output` that becomes `output` when the block succeeds, and vanishes when it
    fails.

    Raises:
        CheckpointError: `output` exists and is not empty (without `force`), or is not a model folder that may be
        replaced.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: is a file; choose another output folder.")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise CheckpointError(f"{output}: is not empty; choose another output folder, or replace it with --force.")
        if not any((output / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise CheckpointError(f"{output}: is not a model folder, so --force will not replace it; choose another.")
    temporary = output.with_name(f".writing-{output.name}-{os.getpid()}")
    replaced = output.with_name(f".replaced-{output.name}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if output.exists():
            output.rename(replaced)
        temporary.rename(output)
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written ({error}); free space or fix permissions, and rerun."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
