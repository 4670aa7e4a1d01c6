"""Training state between the slices ranks hold and the whole canonical tensors a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.model.canonical import gather, localize
from pipeline.model.part import ModelPart
from pipeline.optim import MOMENTS, STEP, TrainableAdamW


def whole_state(
    model: ModelPart, kinds: Sequence[str], optimizer: TrainableAdamW
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """fp32 masters and optimizer state as a checkpoint holds them, whole, on rank 0; collective."""
    # Of the replicas the first one has everything; it is the one that gather asks.
    state = optimizer.state_dict(everywhere=False)
    trained = gather(model, kinds, optimizer.masters(everywhere=False))
    whole = {STEP: state[STEP]} if STEP in state else {}
    for moment in MOMENTS:
        local = {name.removesuffix(f".{moment}"): value for name, value in state.items() if name.endswith(f".{moment}")}
        whole |= {f"{name}.{moment}": value for name, value in gather(model, kinds, local).items()}
    return trained, whole


def load_whole_state(
    model: ModelPart,
    optimizer: TrainableAdamW,
    trained: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
) -> None:
    """The inverse of `whole_state`: every rank is given everything and keeps its slices.

    Raises:
        CheckpointError: see `TrainableAdamW.load_state_dict`.
    """
    local = {STEP: state[STEP]} if STEP in state else {}
    for moment in MOMENTS:
        one = {name.removesuffix(f".{moment}"): value for name, value in state.items() if name.endswith(f".{moment}")}
        local |= {f"{name}.{moment}": value for name, value in localize(model, one).items()}
    optimizer.load_state_dict(localize(model, trained), local)
