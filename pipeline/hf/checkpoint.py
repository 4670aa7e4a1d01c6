"""Hugging Face checkpoint folders, checked and read lazily. safetensors and JSON only: nothing is executed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from parallel.errors import CheckpointError
from pipeline.hf.companions import check_companions
from pipeline.hf.hashes import Hashes, read_hashes
from pipeline.hf.weight_files import choose_weights
from pipeline.storage.digest import sha256_of
from pipeline.storage.pickled import PickledFile
from pipeline.storage.safetensors import SafetensorsFile, TensorFact, read_header
from pipeline.storage.turns import Turns

UNGATHERED = (
    "has no elements, as after saving under DeepSpeed ZeRO-3 without gathering the weights; make whole ones from the "
    "training checkpoint with DeepSpeed's zero_to_fp32.py"
)
"""Said of a tensor that ZeRO-3 left empty on every rank."""
MEAN_ROWS = 1 << 13
"""Rows summed at a time for a mean."""


class HfCheckpoint:
    """A folder of safetensors, single or sharded, opened lazily; see `storage.safetensors` for how.

    Args:
        pickled: the weights are files of torch.save (`storage.pickled`), which an import alone reads.

    Raises:
        CheckpointError: the index or a shard is missing, truncated or disagrees with the other, or two sets of weights
            lie there; the file is named.
    """

    warnings: tuple[str, ...] = ()
    """What lies beside the weights and is not read, one sentence each; for the user's eyes."""

    def __init__(self, folder: Path, pickled: bool = False) -> None:
        self.folder = Path(folder)
        self.facts: dict[str, TensorFact] = {}
        """Name -> shape and dtype."""
        self._file: dict[str, str] = {}
        self._open: dict[str, SafetensorsFile | PickledFile] = {}
        self._digests: dict[str, str] | None = None
        self._turns: Turns | None = None
        chosen = choose_weights(self.folder, pickled)
        self.files = tuple(sorted(chosen.tensors))
        """Names of the weight files."""
        self.warnings = chosen.warnings
        for file, indexed in sorted(chosen.tensors.items()):
            if pickled:
                self._open[file] = PickledFile(self.folder / file)
            facts = self._open[file].facts if pickled else read_header(self.folder / file)
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

    def file_of(self, name: str) -> str:
        """The weight file that holds a tensor.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self._file:
            raise CheckpointError(f"{self.folder}: has no tensor {name}; the weights do not fit its config.json.")
        return self._file[name]

    def _handle(self, name: str) -> SafetensorsFile | PickledFile:
        file = self.file_of(name)
        if file not in self._open:
            self._open[file] = SafetensorsFile(self.folder / file, self._empty)
        return self._open[file]

    def _empty(self, fact: TensorFact) -> torch.Tensor:
        return fact.empty() if self._turns is None else self._turns.empty(fact)

    @contextlib.contextmanager
    def in_turns(self, kept: int) -> Iterator[Callable[[], None]]:
        """Let reads have the memory of earlier ones: a tensor lives through its own turn and the next `kept` - 1.

        Gives what begins a turn. Several threads must not read meanwhile.
        """
        self._turns = Turns(kept)
        try:
            yield self._turns.begin
        finally:
            self._turns = None

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the disk so far (hashing of whole files not counted)."""
        return sum(file.bytes_read for file in self._open.values())

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, in its stored dtype, on the CPU.

        Raises:
            CheckpointError: there is none of this name.
        """
        return self._handle(name).tensor(name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`tensor(name)` restricted to [start, stop) along dim 0 or 1; only those bytes are read.

        Raises:
            CheckpointError: there is none of this name, or the range leaves it.
        """
        return self._handle(name).slice(name, dim, start, stop)

    def block(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor:
        """[start, stop) rows, and columns, of a matrix; only those rows' bytes are read."""
        found = self.slice(name, 0, *rows)
        return found if columns is None else found[:, columns[0] : columns[1]]

    def digest(self, name: str) -> str:
        """Hex SHA-256 of a tensor's bytes."""
        return self._handle(name).digest(name)

    def mean_row(self, name: str) -> torch.Tensor:
        """Mean of all stored rows of a matrix [R, H], fp32 [H]: what added tokens start from.

        Summed in fp64 in a fixed order, so that every rank that asks finds the same bits, whatever it holds itself.
        """
        rows, width = self.facts[name].shape
        total = torch.zeros(width, dtype=torch.float64)
        for start in range(0, rows, MEAN_ROWS):
            total += self.slice(name, 0, start, min(start + MEAN_ROWS, rows)).double().sum(0)
        return (total / rows).float()

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        ignore: Callable[[str], bool] = lambda name: False,
        one_dtype: bool = True,
    ) -> None:
        """Compare with the tensors config.json implies (`tensors.hf_tensor_shapes`), after a look at the small files
        beside them (`check_companions`).

        An `lm_head.weight` beside tied embeddings is accepted when it equals them.

        Args:
            one_dtype: refuse tensors of other dtypes than most have; False where they are cast anyway.

        Raises:
            CheckpointError: a tensor is missing, misshaped, unknown or of another dtype; the file and tensor are named.
        """
        check_companions(self.folder)
        for name, shape in shapes.items():
            if name not in self.facts:
                raise CheckpointError(f"{self.folder}: has no tensor {name}; the weights do not fit its config.json.")
            if 0 in self.facts[name].shape:
                raise CheckpointError(f"{self.folder / self._file[name]}: {name} {UNGATHERED}.")
            if self.facts[name].shape != tuple(shape):
                raise CheckpointError(
                    f"{self.folder / self._file[name]}: {name} has shape {self.facts[name].shape}, but config.json "
                    f"describes {tuple(shape)}; the two files belong to different models."
                )
        for name in shapes if one_dtype else ():
            if self.facts[name].dtype is not self.dtype:
                raise CheckpointError(
                    f"{self.folder / self._file[name]}: {name} is {_short(self.facts[name].dtype)} where most weights "
                    f"are {_short(self.dtype)}; make them one with longspan import --dtype bf16."
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

    def recorded(self) -> Hashes:
        """Hashes recorded of this folder when it was made or downloaded; empty where there are none."""
        return read_hashes(self.folder, self.files)

    def digests(self) -> dict[str, str]:
        """Weight file -> SHA-256, compared with what is recorded; reads every byte, once a process.

        Raises:
            CheckpointError: a file differs from its recorded hash; it and the tensor are named.
        """
        if self._digests is None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = dict(zip(self.files, pool.map(sha256_of, map(self.folder.joinpath, self.files)), strict=True))
            recorded = self.recorded()
            for file, digest in found.items():
                if recorded.files.get(file, digest) != digest:
                    raise self._damaged(file, recorded)
            self._digests = found
        return self._digests

    def _damaged(self, file: str, recorded: Hashes) -> CheckpointError:
        """Find the tensor in a file whose hash is wrong."""
        handle = self._open.get(file) or SafetensorsFile(self.folder / file)
        recorded_here = [name for name in handle.facts if name in recorded.tensors]
        wrong = [name for name in recorded_here if handle.digest(name) != recorded.tensors[name]]
        if recorded_here:
            where = f"tensor {wrong[0]} changed" if wrong else "its header changed, its tensors did not"
        else:
            where = f"which tensor is not recorded, the file holds {len(handle.facts)}"
        return CheckpointError(
            f"{self.folder / file}: does not match the SHA-256 in {recorded.source} ({where}); download or import it "
            "again."
        )

    def base_hash(self) -> str:
        """SHA-256 over the sorted SHA-256 of every weight file: identifies the weights; see `digests`."""
        return hashlib.sha256("\n".join(sorted(self.digests().values())).encode()).hexdigest()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
