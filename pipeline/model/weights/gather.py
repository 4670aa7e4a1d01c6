"""Trained tensors between the ranks that hold slices of them and whole ones under canonical names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import VOCABULARY_HF
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes, tp_slice
from pipeline.planning.trainable import trained_names

_LAYER = re.compile(r"model\.layers\.(\d+)\.")

Slice = tuple[int, int, int] | None
"""(dim, start, stop) of a whole tensor; None: all of it."""


def owned(model: RankModel, kinds: Sequence[str], tp: int, pp: int) -> Iterator[tuple[str, tuple[int, ...], Slice]]:
    """(name, whole shape, slice) of every trained tensor that ranks (tp, pp) keep for the checkpoint, in a fixed order.

    A tied copy of the embedding on the last stage is not kept twice; replicated tensors are kept by tp 0.
    """
    plan = model.groups.plan
    layers = model.chunk_layers
    mine = {layer for number in range(pp, len(layers), plan.pp) for layer in layers[number]}
    shapes = {**hf_tensor_shapes(model.arch), **adapter_shapes(model.arch, model.lora)}
    trained = trained_names(model.arch, model.lora, kinds)
    for name, shape in shapes.items():
        if name not in trained:
            continue
        match = _LAYER.match(name)
        here = int(match.group(1)) in mine if match else pp == (0 if "embed" in name else plan.pp - 1)
        cut = tp_slice(name, model.arch, tp, plan.tp) if plan.tp > 1 else None
        if here and (cut is not None or tp == 0):
            yield name, shape, cut


def gather(model: RankModel, kinds: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors on rank 0 (CPU), nothing elsewhere; collective.

    Args:
        model: whose trained parameters `tensors` follow.
        kinds: train.trainable.
        tensors: canonical name -> this rank's slice, fp32, shaped as the parameter (padding rows included).
    """
    groups, plan = model.groups, model.groups.plan
    whole: dict[str, torch.Tensor] = {}
    for pp in range(plan.pp):
        for tp in range(plan.tp):
            owner = plan.rank(tp, 0, 0, pp)
            if groups.env.rank not in (0, owner):
                continue
            for name, shape, cut in owned(model, kinds, tp, pp):
                piece_shape = list(shape)
                if cut is not None:
                    piece_shape[cut[0]] = cut[2] - cut[1]
                if groups.env.rank == owner:
                    # Through host memory: a save must not set the GPU's peak.
                    piece = tensors[name].detach().cpu()
                    if name in VOCABULARY_HF:
                        piece = piece[: piece_shape[0]]
                    if owner:
                        dist.send(piece.contiguous(), 0, group=groups.host)
                        continue
                else:
                    piece = torch.empty(piece_shape, dtype=torch.float32)
                    dist.recv(piece, owner, group=groups.host)
                target = whole.setdefault(name, torch.empty(shape, dtype=torch.float32))
                (target if cut is None else target.narrow(cut[0], cut[1], cut[2] - cut[1])).copy_(piece)
    return whole
