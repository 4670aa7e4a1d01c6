"""A checkpoint read back: proof that it is whole, and any range of any tensor from its pieces. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.checkpoint.manifest import (
    FIELDS,
    MASTER,
    Cut,
    Manifest,
    Piece,
    TensorEntry,
    rank_file,
    read_manifest,
)
from pipeline.storage.durable import ArrayFile, Damaged, facts_of


class CheckpointReader:
    """Reads one checkpoint folder; a context manager.

    Args:
        folder: of the checkpoint.

    Raises:
        Damaged, CheckpointError: see `read_manifest`.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest: Manifest = read_manifest(folder)
        self._open: dict[str, ArrayFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> int:
        """Compare every file with its checksum, several at a time; returns the bytes read.

        Args:
            on_bytes: called with every count of bytes read.

        Raises:
            Damaged: names the first file that differs, and both checksums.
        """
        manifest = self.manifest
        names = sorted(manifest.files)
        for name in names:  # sizes first: cheap, and a file of another size is never read
            path = manifest.folder / name
            size = path.lstat().st_size if path.exists() else 0
            if path.exists() and not path.is_symlink() and size != manifest.files[name].bytes:
                raise Damaged(
                    f"{path}: has {size} bytes instead of {manifest.files[name].bytes} (damaged, declared sha256 "
                    f"{manifest.files[name].sha256[:16]}); resume from another checkpoint."
                )
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda name: facts_of(manifest.folder / name, on_bytes), names)
            for name, facts in zip(names, found, strict=True):
                if facts != manifest.files[name]:
                    raise Damaged(
                        f"{manifest.folder / name}: does not match its checksum (sha256 {facts.sha256[:16]}, declared "
                        f"{manifest.files[name].sha256[:16]}: damaged); resume from another checkpoint."
                    )
        if manifest.format > 1:
            self._check_headers()
        return sum(facts.bytes for facts in manifest.files.values())

    def _check_headers(self) -> None:
        """Prove that every file holds the pieces the manifest puts there; reads none of them."""
        for name, entry in self.manifest.tensors.items():
            for piece in entry.pieces:
                for field in FIELDS:
                    file, key = _place(piece, name, field)
                    if self._file(file).shapes.get(key) != (piece.stop - piece.start,):
                        raise Damaged(
                            f"{self.manifest.folder / file}: does not hold the piece of {key} that the manifest puts "
                            "there; resume from another checkpoint."
                        )

    def _file(self, name: str) -> ArrayFile:
        if name not in self._open:
            if name not in self.manifest.files:
                raise Damaged(
                    f"{self.manifest.folder / name}: is missing from the checkpoint; resume from another one."
                )
            self._open[name] = ArrayFile(self.manifest.folder / name)
        return self._open[name]

    def whole(self, name: str, field: str = MASTER) -> np.ndarray:
        """A whole tensor, fp32, in its shape; see `read`."""
        shape = self.manifest.tensors[name].shape
        return self.read(name, field, None, 0, math.prod(shape)).reshape(shape)

    def read(self, name: str, field: str, cut: Cut, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flattened cut of a tensor: fp32, 1-D; reads little more than these.

        Args:
            name: canonical.
            field: one of FIELDS.
            cut: (dim, start, stop) of the whole tensor; None: all of it.

        Raises:
            Damaged: a file does not hold what the manifest says.
            KeyError: no such tensor or field.
        """
        if field not in FIELDS:
            raise KeyError(field)
        entry = self.manifest.tensors[name]
        width = math.prod(entry.shape[1:])
        if cut is None or cut[0] == 0:
            offset = 0 if cut is None else cut[1] * width
            return self._flat(name, field, entry, offset + start, offset + stop)
        # Columns: the rows that hold them, whole, and then the columns.
        _, left, right = cut
        low, high = start // (right - left), -(-stop // (right - left))
        rows = self._flat(name, field, entry, low * width, high * width).reshape(-1, width)
        base = low * (right - left)
        return np.ascontiguousarray(rows[:, left:right]).reshape(-1)[start - base : stop - base]

    def _flat(self, name: str, field: str, entry: TensorEntry, first: int, last: int) -> np.ndarray:
        """Elements [first, last) of the flattened whole tensor."""
        found = np.empty(last - first, np.float32)
        for piece in entry.pieces:
            file, key = _place(piece, name, field)
            if piece.cut is None or piece.cut[0] == 0:
                offset = (0 if piece.cut is None else piece.cut[1]) * math.prod(entry.shape[1:])
                low, high = max(first, offset + piece.start), min(last, offset + piece.stop)
                if low < high:
                    found[low - first : high - first] = self._values(file, key, piece, low - offset, high - offset)
                continue
            _, left, right = piece.cut
            width, share = entry.shape[1], right - left
            low = max(piece.start, first // width * share)
            high = min(piece.stop, -(-last // width) * share)
            if low < high:
                within = np.arange(low, high)
                places = within // share * width + left + within % share - first
                kept = (places >= 0) & (places < last - first)
                found[places[kept]] = self._values(file, key, piece, low, high)[kept]
        return found

    def _values(self, file: str, key: str, piece: Piece, start: int, stop: int) -> np.ndarray:
        """Elements of a piece, counted in its cut."""
        return self._file(file).read(key, "F32", start - piece.start, stop - piece.start)

    def rng(self, rank: int) -> dict[str, np.ndarray] | None:
        """Random state of a rank, uint8; None if there was no such rank."""
        name = rank_file("rng", rank)
        if name not in self.manifest.files:
            return None
        file = self._file(name)
        return {key: file.read(key, "U8") for key in file.shapes}


def _place(piece: Piece, name: str, field: str) -> tuple[str, str]:
    """File and key of a piece's field."""
    if field == MASTER:
        return piece.trained_file, name
    return piece.optimizer_file, f"{name}.{field}"
