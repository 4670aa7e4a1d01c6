"""Weights in and out of the model under canonical (Hugging Face) names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from parallel.axes.zero3 import FrozenShards, ShardPiece
from parallel.errors import CheckpointError, ConfigError
from pipeline.config.sections import LoraConfig
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.vocabulary import VOCABULARY_HF, read_rows
from pipeline.hf.weight_source import WeightSource
from pipeline.model.layers.frozen_weight import FrozenWeight
from pipeline.model.layers.lora import initial_a
from pipeline.model.weights.fusing import fuse_gate_up, fuse_qkv
from pipeline.planning.arch import LlamaArch
from pipeline.planning.tensors import adapter_shapes, row_runs, to_hf, tp_slice, vocab_range
from pipeline.planning.trainable import kind_of, trains


class Part(Protocol):
    """A model, or what one rank holds of it: `LlamaChunk` and `RankModel`."""

    arch: LlamaArch
    lora: LoraConfig
    tp_rank: int
    tp_size: int
    shards: FrozenShards | None
    """Engine zero3's frozen matrices; their parameters are empty until used."""

    def canonical_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(our name with global layer indices, parameter)."""

    def frozen_matrices(self) -> Iterator[tuple[str, FrozenWeight]]:
        """(our name, matrix) of the layers' linears."""


ROWS = 4096
"""Of a sharded matrix, read and encoded at a time."""
VOCABULARY = ("embedding.weight", "output_layer.weight")
"""Parameters whose rows are tokens, padded to a multiple of tp."""


def _cut(checkpoint: WeightSource, hf_name: str, part: Part, whole_rows: bool = False) -> torch.Tensor:
    """This rank's slice of a stored tensor; only its bytes are read. With `whole_rows`, all columns."""
    if hf_name in VOCABULARY_HF:
        return read_rows(checkpoint, hf_name, *vocab_range(part.arch, part.tp_rank, part.tp_size))
    found = tp_slice(hf_name, part.arch, part.tp_rank, part.tp_size) if part.tp_size > 1 else None
    return (
        checkpoint.tensor(hf_name) if found is None or (whole_rows and found[0]) else checkpoint.slice(hf_name, *found)
    )


@dataclass(frozen=True)
class _Piece:
    """Something to load."""

    read: Callable[[], list[torch.Tensor]]
    """From the source; called in the order of the pieces, one at a time, maybe in a thread of its own."""
    place: Callable[[list[torch.Tensor]], None]
    """Copies into the model what was read, whose memory later pieces use again."""


def _load(pieces: Iterable[_Piece], checkpoint: WeightSource) -> None:
    """Read and place each piece, and from a folder the next one meanwhile: disk and bus work at once."""
    if not isinstance(checkpoint, HfCheckpoint):  # made up on the device, by this thread
        for piece in pieces:
            piece.place(piece.read())
        return
    with checkpoint.in_turns(2) as begin, ThreadPoolExecutor(1, "read-weights") as reader:

        def read(piece: _Piece) -> list[torch.Tensor]:
            begin()
            return piece.read()

        last: tuple[_Piece, Future[list[torch.Tensor]]] | None = None
        for piece in pieces:
            reading = reader.submit(read, piece)
            if last is not None:
                last[0].place(last[1].result())
            last = piece, reading
        if last is not None:
            last[0].place(last[1].result())


def load_base(part: Part, checkpoint: WeightSource) -> None:
    """Fill every parameter but the adapters from a Hugging Face checkpoint, casting to the parameter's dtype.

    Each rank reads its own layers and slices, one matrix ahead of the one that is put in place; of a matrix kept in
    another form whole rows, which are encoded where it lies. Vocabulary rows that only pad it to a multiple of tp are
    zero; those the architecture has beyond the stored ones (added tokens) are the mean of all stored ones, alike on
    every rank.

    Raises:
        CheckpointError: a tensor is missing or misshaped (named).
    """
    with torch.no_grad():
        _load(_whole_pieces(part, checkpoint), checkpoint)
        if part.shards is not None:
            _load(_share_pieces(part, part.shards, checkpoint), checkpoint)


def _whole_pieces(part: Part, checkpoint: WeightSource) -> Iterator[_Piece]:
    """Every parameter that is not in `part.shards`."""
    matrices = dict(part.frozen_matrices())
    beside = {id(member) for matrix in matrices.values() for key, member in matrix.members().items() if key != "weight"}
    for name, parameter in part.canonical_parameters():
        if kind_of(name) == "lora" or id(parameter) in beside:
            continue
        if part.shards is not None and part.shards.holds(parameter):
            continue
        sources = [hf_name for hf_name, _ in to_hf(name)]
        matrix = matrices.get(name)
        rows = matrix is not None and matrix.whole_rows
        yield _Piece(partial(_cuts, checkpoint, sources, part, rows), partial(_place, name, parameter, matrix, part))


def _cuts(checkpoint: WeightSource, sources: Sequence[str], part: Part, whole_rows: bool) -> list[torch.Tensor]:
    return [_cut(checkpoint, source, part, whole_rows) for source in sources]


def _place(
    name: str, parameter: torch.Tensor, matrix: FrozenWeight | None, part: Part, found: list[torch.Tensor]
) -> None:
    """Put a parameter's stored tensors, or this rank's slices of them, in place."""
    source = to_hf(name)[0][0]
    if name in VOCABULARY:
        _fill_rows(source, parameter, found[0], part)
        return
    # Fused on the device: in host memory that copies every byte once more.
    whole = _assemble(name, [tensor.to(parameter.device) for tensor in found], part.arch)
    if whole.shape != (wanted := parameter.shape if matrix is None else matrix.given_shape):
        raise _misshaped(source, whole, wanted)
    if matrix is None:
        parameter.copy_(whole)
    else:
        matrix.write(whole)


def _share_pieces(part: Part, shards: FrozenShards, checkpoint: WeightSource) -> Iterator[_Piece]:
    """The rows that this rank's shares hold some of, and no others, into them.

    A matrix and its scales may lie in two ranks' shares; both then read its rows.
    """
    matrices = dict(part.frozen_matrices())
    where = {id(member): (name, key) for name, matrix in matrices.items() for key, member in matrix.members().items()}
    known = {id(parameter): (name, "weight") for name, parameter in part.canonical_parameters()} | where
    held: dict[str, list[tuple[str, ShardPiece]]] = {}
    for piece in shards.pieces():
        name, key = known[id(piece.parameter)]
        held.setdefault(name, []).append((key, piece))
    for name, pieces in held.items():
        yield from _row_pieces(name, matrices.get(name), pieces, part, checkpoint)


def _row_pieces(
    name: str,
    matrix: FrozenWeight | None,
    pieces: Sequence[tuple[str, ShardPiece]],
    part: Part,
    checkpoint: WeightSource,
) -> Iterator[_Piece]:
    """Stretches of one matrix's members, some rows at a time."""
    filled = [0] * len(pieces)

    def place(low: int, found: list[torch.Tensor]) -> None:
        (rows,) = found
        if matrix is not None and matrix.whole_rows:  # encoded where the model computes
            rows = rows.to(pieces[0][1].parameter.device)
        encoded = {"weight": rows} if matrix is None else matrix.encode(rows)
        for number, (key, piece) in enumerate(pieces):
            filled[number] += piece.fill(low, encoded[key])

    def pad(nothing: list[torch.Tensor]) -> None:
        for count, (_, piece) in zip(filled, pieces, strict=True):
            if count < len(piece.target):
                # Rows that only pad the vocabulary, behind all others.
                piece.target[count:].zero_()

    for run in row_runs(name, part.arch, part.tp_rank, part.tp_size):
        for first in range(run.row, run.row + run.count, ROWS):
            block = first, min(first + ROWS, run.row + run.count)
            touched = [rows for _, piece in pieces if (rows := piece.rows(*block)) is not None]
            if not touched:
                continue
            low, high = min(start for start, _ in touched), max(stop for _, stop in touched)
            source = run.source + low - run.row
            columns = None if matrix is not None and matrix.whole_rows else run.columns
            stored = source, source + high - low
            yield _Piece(partial(_rows, checkpoint, run.hf_name, stored, columns), partial(place, low))
    yield _Piece(list, pad)


def _rows(
    checkpoint: WeightSource, hf_name: str, rows: tuple[int, int], columns: tuple[int, int] | None
) -> list[torch.Tensor]:
    """Stored rows of a matrix, of which the vocabulary's may be added ones."""
    if hf_name in VOCABULARY_HF:
        return [read_rows(checkpoint, hf_name, *rows)]
    return [checkpoint.block(hf_name, rows, columns)]


def _misshaped(hf_name: str, found: torch.Tensor, wanted: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        f"{hf_name}: shape {tuple(found.shape)} in the checkpoint does not fit the {tuple(wanted)} that "
        "config.json describes; the two files belong to different models."
    )


def _fill_rows(hf_name: str, parameter: torch.Tensor, rows: torch.Tensor, part: Part) -> None:
    """Copy a vocabulary slice, and zero the padding rows behind it."""
    first, last = vocab_range(part.arch, part.tp_rank, part.tp_size)
    if rows.shape != (last - first, *parameter.shape[1:]):
        raise _misshaped(hf_name, rows, (last - first, *parameter.shape[1:]))
    parameter[: len(rows)].copy_(rows)
    parameter[len(rows) :].zero_()


def _assemble(name: str, parts: Sequence[torch.Tensor], arch: LlamaArch) -> torch.Tensor:
    """Fuse the Hugging Face tensors, or like slices of them, of one parameter of ours."""
    if "linear_qkv." in name:
        query, key, value = parts
        return fuse_qkv(query, key, value, arch)
    if "linear_fc1." in name:
        return fuse_gate_up(*parts)
    (whole,) = parts
    return whole


def init_adapters(part: Part, seed: int) -> None:
    """Draw every A factor from the seed and its canonical name (see `lora.initial_a`); B factors stay zero."""
    shapes = adapter_shapes(part.arch, part.lora)
    with torch.no_grad():
        for name, parameter in part.canonical_parameters():
            if name.endswith(".lora_A"):
                ((hf_name, _),) = to_hf(name)
                parameter.copy_(local_slice(initial_a(hf_name, seed, shapes[hf_name]), hf_name, part))


def local_slice(whole: torch.Tensor, hf_name: str, part: Part) -> torch.Tensor:
    """What this tensor-parallel rank holds of a canonical tensor; a view."""
    if part.tp_size == 1:
        return whole
    found = tp_slice(hf_name, part.arch, part.tp_rank, part.tp_size)
    return whole if found is None else whole.narrow(found[0], found[1], found[2] - found[1])


def mark_trainable(part: Part, kinds: Sequence[str]) -> None:
    """Set requires_grad per parameter; with tied embeddings `lm_head` means the embedding.

    Raises:
        ConfigError: nothing would train.
    """
    for name, parameter in part.canonical_parameters():
        parameter.requires_grad_(trains(name, kinds, part.arch))
    if not any(parameter.requires_grad for _, parameter in part.canonical_parameters()):
        raise ConfigError(
            f"train.trainable: {', '.join(kinds)} selects no parameter of this model, or of a pipeline stage "
            "of it; add lora or norm."
        )


def trainable(part: Part) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(canonical name, kind, parameter) of everything that trains; such parameters are never fused."""
    for name, parameter in part.canonical_parameters():
        if parameter.requires_grad:
            ((hf_name, _),) = to_hf(name)
            yield hf_name, kind_of(name), parameter


def load_trained(part: Part, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite this chunk's trained parameters from a canonical state dict of whole tensors.

    Raises:
        CheckpointError: a tensor is missing or misshaped.
    """
    with torch.no_grad():
        for name, _, parameter in trainable(part):
            if name not in tensors:
                raise CheckpointError(
                    f"Checkpoint: holds no trained {name}; resume with the lora and train.trainable settings it was "
                    "made with."
                )
            found = local_slice(tensors[name], name, part)
            if name in VOCABULARY_HF:
                _fill_rows(name, parameter, found, part)
            elif found.shape != parameter.shape:
                raise CheckpointError(
                    f"Checkpoint: {name} has shape {tuple(tensors[name].shape)}, which does not fit the model's "
                    f"{tuple(parameter.shape)}; resume with the lora settings it was made with."
                )
            else:
                parameter.copy_(found)
