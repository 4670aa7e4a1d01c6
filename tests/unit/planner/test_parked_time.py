"""Waits for gate and up that go to the host and come back: by hand, and by the code that parks, on its own clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from pipeline.model.layers import parking
from pipeline.planner.clock import step_time
from pipeline.planner.gpus import find_gpu
from pipeline.planner.parked_time import LayerPass, waits
from tools.support.plan_points import Point

H200 = find_gpu("h200")


class Stream:
    """Work that is done one after another; its time is where it has come to."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.now = self.copy = 0.0

    def wait_stream(self, other: Stream) -> None:
        self.now = max(self.now, other.now)

    def record_event(self) -> float:
        """Recorded after a copy, and after nothing else."""
        self.now += self.copy
        return self.now

    def wait_event(self, event: float) -> None:
        self.now = max(self.now, event)


def by_the_code(layers: list[LayerPass], loss: float) -> float:
    """What `Parking` makes the computing stream wait for in one pass."""
    computing, copying, real = Stream(), Stream(), parking.Parking(torch.device("cpu"))
    real._stream = copying  # type: ignore[assignment]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    cuda = SimpleNamespace(current_stream=lambda: computing, stream=on)
    with mock.patch.object(torch, "cuda", cuda), mock.patch.object(parking, "pin", lambda buffer: 0):
        parked = {}
        for number, layer in enumerate(layers):
            computing.now += layer.forward
            if layer.out:
                copying.copy = layer.out
                parked[number] = real.park(torch.full((4,), float(number)))
        computing.now += loss
        for number, layer in reversed(list(enumerate(layers))):
            if layer.out:
                assert real.take(parked[number]).tolist() == [number] * 4
            computing.now += layer.backward
    return computing.now - loss - sum(layer.forward + layer.backward for layer in layers)


def test_copies_longer_than_a_layer_by_hand() -> None:
    """Ten layers of 1 s whose copies take 2: from the fourth on each waits 1 s, as two may be on their way."""
    layers = [LayerPass(1.0, 3.0, 2.0)] * 10
    assert waits(layers, loss=5.0) == (7.0, 0.0)
    # The last copy ends 4 s after the forward pass does, and is what the backward needs first.
    assert waits(layers, loss=1.0) == (7.0, 3.0)
    assert waits([LayerPass(1.0, 1.5, 2.0)] * 10, loss=5.0) == (7.0, 8 * 0.5)
    assert waits([LayerPass(2.0, 3.0, 2.0)] * 10, loss=5.0) == waits([LayerPass(2.0, 3.0)] * 10, 0.0) == (0.0, 0.0)


def test_layers_between_hide_copies() -> None:
    apart = [LayerPass(1.0, 3.0, 2.0), LayerPass(1.0, 3.0)] * 8
    assert waits(apart, loss=5.0) == (0.0, 0.0)
    assert waits([LayerPass(1.0, 3.0, 2.0)] * 8 + [LayerPass(1.0, 3.0)] * 8, loss=5.0) == (5.0, 0.0)


def test_weights_come_by_the_same_wires_in_the_backward_pass() -> None:
    """A layer's 3 s hide its weights' 2, or gate and up's 2, but not both."""
    layers = [LayerPass(2.0, 3.0, 2.0, weights=2.0)] * 10
    assert waits(layers, loss=5.0) == (0.0, 8 * 1.0)


@pytest.mark.parametrize("copy", [0.5, 1.0, 1.7, 2.5, 7.0])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("loss", [0.0, 4.0])
def test_as_the_code_that_parks(copy: float, every: int, loss: float) -> None:
    layers = [LayerPass(1.0 + number / 40, 1.8, copy * (number % every == 0)) for number in range(17)]
    assert sum(waits(layers, loss)) == pytest.approx(by_the_code(layers, loss), abs=1e-9)


def test_a_step_waits_for_the_link_that_all_its_gate_and_up_leave_by() -> None:
    settings = {"recompute": "pointwise", "gate_up": "host", "group": 8192, "stream": 32768}
    plan = Point("test", "llama3-8b", 1, 262144, settings, "held").plan()
    slow = replace(H200, measured={**H200.measured, "pcie": 5e9})
    # 32 layers, 8 chunks of 32768 tokens, gate and up of 14336 each in bf16, there and back: the link is never idle.
    link = 8 * 2 * 32 * (32768 * 2 * 14336 * 2) / 5e9
    time = step_time(plan, slow)
    whole = time.total - sum(time.parts[name] for name in ("optimizer", "recompute"))
    assert whole == pytest.approx(link, rel=0.06)
    # What a link hides is told as well.
    fast = step_time(plan, H200)
    assert fast.hidden + fast.parts["copies"] == pytest.approx(link * 5e9 / H200.rate("pcie"))
