"""Training state between what ranks hold and what a checkpoint holds: pieces of whole canonical tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from parallel.errors import CheckpointError
from pipeline.checkpoint.manifest import MASTER, Cut, cut_shape
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.saver import StatePiece
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.gather import gather, owned
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes, tp_slice
from pipeline.planning.trainable import trained_names
from pipeline.training.optimizer import MOMENTS, STEP, TrainableAdamW


def own_pieces(model: RankModel, kinds: Sequence[str], optimizer: TrainableAdamW) -> list[StatePiece]:
    """What this rank keeps for a checkpoint: its optimizer's slices of its tensors, live; not collective.

    Over all ranks every trained element comes once: of tensors alike on several ranks, one has it (see `owned`), and
    rows that pad the vocabulary are left out.
    """
    here = model.groups.coordinates
    kept = {name: (shape, cut) for name, shape, cut in owned(model, kinds, here.tp, here.pp)}
    found = []
    for name, start, stop, state in optimizer.own_pieces():
        if name not in kept:
            continue
        shape, cut = kept[name]
        stop = min(stop, math.prod(cut_shape(shape, cut)))
        if start < stop:
            flat = {MASTER if field == "master" else field: tensor[: stop - start] for field, tensor in state.items()}
            found.append(StatePiece(name, shape, cut, start, stop, flat))
    return found


def load_state(model: RankModel, kinds: Sequence[str], optimizer: TrainableAdamW, reader: CheckpointReader) -> None:
    """Restore this rank's share of a checkpoint written on any layout; collective when the optimizer is sharded.

    Raises:
        CheckpointError: it holds other tensors than those that train here (before anything is changed), or is damaged.
    """
    check_trained(model, kinds, reader)
    tp, tensors = model.groups.plan.tp, reader.manifest.tensors
    cuts: dict[str, Cut] = {name: tp_slice(name, model.arch, model.tp_rank, tp) if tp > 1 else None for name in tensors}

    def read(name: str, field: str, start: int, stop: int) -> torch.Tensor:
        cut = cuts[name]
        limit = math.prod(cut_shape(tensors[name].shape, cut))
        found = torch.zeros(stop - start)  # rows that pad the vocabulary stay zero
        if start < min(stop, limit):
            values = reader.read(name, MASTER if field == "master" else field, cut, start, min(stop, limit))
            found[: len(values)] = torch.from_numpy(values)
        return found

    optimizer.load_pieces(read, reader.manifest.updates)


def load_weights(
    model: RankModel, optimizer: TrainableAdamW, taken: Collection[str], weights: Callable[..., torch.Tensor]
) -> None:
    """Begin with given weights, zero moments and no update done; collective when the optimizer is sharded.

    Args:
        taken: canonical names of the tensors to replace; the others stay as they are.
        weights: (name, cut, start, stop) -> elements [start, stop) of the flattened cut of a tensor, fp32, 1-D.
    """
    tp = model.groups.plan.tp
    shapes = {**hf_tensor_shapes(model.arch), **adapter_shapes(model.arch, model.lora)}
    own = {(name, start): state["master"].clone() for name, start, _, state in optimizer.own_pieces()}

    def read(name: str, field: str, start: int, stop: int) -> torch.Tensor:
        found = torch.zeros(stop - start)  # rows that pad the vocabulary stay zero
        if field != "master":
            return found
        if name not in taken:
            return own[name, start]
        cut: Cut = tp_slice(name, model.arch, model.tp_rank, tp) if tp > 1 else None
        limit = min(stop, math.prod(cut_shape(shapes[name], cut)))
        if start < limit:
            found[: limit - start] = weights(name, cut, start, limit)
        return found

    optimizer.load_pieces(read, 0)


def check_trained(model: RankModel, kinds: Sequence[str], reader: CheckpointReader) -> None:
    """Refuse a checkpoint that holds other tensors than those that train here, or of other shapes.

    Raises:
        CheckpointError: names one.
    """
    shapes = {**hf_tensor_shapes(model.arch), **adapter_shapes(model.arch, model.lora)}
    tensors = reader.manifest.tensors
    odd = sorted(trained_names(model.arch, model.lora, kinds) ^ tensors.keys())
    if odd:
        raise CheckpointError(
            f"{reader.manifest.folder}: its trained tensors differ from the configuration's ({odd[0]} and "
            f"{len(odd) - 1} more on one side only); resume with the lora and train.trainable settings it had."
        )
    for name, entry in tensors.items():
        if entry.shape != shapes[name]:
            raise CheckpointError(
                f"{reader.manifest.folder}: {name} has shape {entry.shape} there and {shapes[name]} in the run; resume "
                "with the lora settings and the base it was made with."
            )


def whole_state(
    model: RankModel, kinds: Sequence[str], optimizer: TrainableAdamW
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """fp32 masters and optimizer state of all ranks, whole, on rank 0; collective. To compare runs, not to save."""
    # Of the replicas the first one has everything; it is the one that gather asks.
    state = optimizer.state_dict(everywhere=False)
    trained = gather(model, kinds, optimizer.masters(everywhere=False))
    whole = {STEP: state[STEP]} if STEP in state else {}
    for moment in MOMENTS:
        local = {name.removesuffix(f".{moment}"): value for name, value in state.items() if name.endswith(f".{moment}")}
        whole |= {f"{name}.{moment}": value for name, value in gather(model, kinds, local).items()}
    return trained, whole
