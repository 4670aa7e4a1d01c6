"""Seconds that a pass waits for gate and up on their way to host memory and back (`RecomputePolicy.HOST`).

Layers are gone along as `layers.parking` does it: copies follow each other on one stream; before a further layer's gate
and up leave, the computation waits for all copies but the PARKED - 1 latest; in the backward pass the next ones are
asked for as the last are taken. Nothing is fitted: bytes, the link's rate, and the time of the layers between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.planning.activations import PARKED


@dataclass(frozen=True)
class LayerPass:
    """One layer's part in one forward and backward pass, seconds."""

    forward: float
    backward: float
    out: float = 0.0
    """Of copying its gate and up to the host, and of copying them back; 0: they stay."""
    weights: float = 0.0
    """Of copying its weights from the host, on the wires that gate and up come back by."""


def waits(layers: Sequence[LayerPass], loss: float) -> tuple[float, float]:
    """Seconds (forward, backward) that the computation waits for copies.

    Args:
        layers: of the stage, in order.
        loss: seconds between the last layer's forward and its backward.
    """
    ended, now = _leave(layers)
    forward = now - sum(layer.forward for layer in layers)
    if not ended:
        return 0.0, 0.0
    now += loss
    turned = now
    # What left last is on the GPU still, and is there to be taken once its copy has ended.
    there = {number: end for number, end in enumerate(ended) if number >= len(ended) - PARKED}
    wires, number = ended[-1], len(ended)
    for at in reversed(range(len(layers))):
        layer = layers[at]
        if layer.out:
            number -= 1
            now = max(now, there[number])
            if number and number - 1 not in there:
                # Until it is wanted, weights of the layers before this one come over the same wires.
                wires = there[number - 1] = max(now, wires) + _next(layers, at)
        now += layer.backward
    return forward, now - turned - sum(layer.backward for layer in layers)


def _leave(layers: Sequence[LayerPass]) -> tuple[list[float], float]:
    """When each copy to the host has ended, and when the forward pass has."""
    ended: list[float] = []
    now = 0.0
    for layer in layers:
        now += layer.forward
        if layer.out:
            if len(ended) >= PARKED:
                now = max(now, ended[-PARKED])
            ended.append(max([now, *ended[-1:]]) + layer.out)
    return ended, now


def _next(layers: Sequence[LayerPass], at: int) -> float:
    """Seconds on the wires for the parked layer before `at`, and for the weights of the layers down to it."""
    total = 0.0
    for layer in reversed(layers[:at]):
        total += layer.weights
        if layer.out:
            return total + layer.out
    return total
