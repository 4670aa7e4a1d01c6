"""Less of the training than all of it: weights on the straight line from the base's to the trained ones.

Such weights often keep what the base could do and most of what training brought (WiSE-FT, Wortsman et al.,
arXiv 2109.01903), and cost nothing to serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from parallel.errors import CheckpointError
from pipeline.export.adapter_kinds import EMBEDDING_FACTORS, FACTORS, MAGNITUDE
from pipeline.export.trained_model import ShapedTensors, TrainedModel, shape_of
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.vocabulary import grown_tensor
from pipeline.hf.weight_source import WeightSource


class PartWay(ShapedTensors):
    """Trained tensors moved back towards the base: W + strength (trained W - W), one at a time.

    An adapter's update B A is scaled by its factor B, so that rank and alpha stay what they were.

    Args:
        trained: canonical names -> tensors, as in a checkpoint.
        base: whose whole tensors they were trained from; of a grown vocabulary, with the rows training began with.
        vocab: rows of embedding and output matrix.
        strength: from 0, the base, to 1, all of the training.

    Raises:
        CheckpointError: an adapter has DoRA's magnitudes, which no factor of B A expresses.
    """

    def __init__(self, trained: Mapping[str, torch.Tensor], base: WeightSource, vocab: int, strength: float) -> None:
        assert 0 <= strength <= 1
        if any(name.endswith(MAGNITUDE) for name in trained):
            raise CheckpointError("--strength: an adapter with DoRA's magnitudes is exported whole; leave it out.")
        self._trained, self._base, self._vocab, self._strength = trained, base, vocab, strength

    def __getitem__(self, name: str) -> torch.Tensor:
        trained = self._trained[name]
        if name.endswith((FACTORS[1], EMBEDDING_FACTORS[1])):
            return trained * self._strength
        if name.endswith((FACTORS[0], EMBEDDING_FACTORS[0])):
            return trained
        start = grown_tensor(self._base, name, self._vocab)
        return torch.lerp(start.float(), trained.float(), self._strength).to(trained.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._trained, name)

    def __contains__(self, name: object) -> bool:
        return name in self._trained

    def __iter__(self) -> Iterator[str]:
        return iter(self._trained)

    def __len__(self) -> int:
        return len(self._trained)


def part_way(model: TrainedModel, strength: float) -> TrainedModel:
    """The model with `strength` of its training; see `PartWay`, and for what is raised."""
    if strength == 1:
        return model
    trained = PartWay(model.trained, HfCheckpoint(model.base), model.arch.vocab, strength)
    return replace(model, trained=trained, strength=strength)
