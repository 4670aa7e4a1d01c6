"""Streaming with weights in host memory: in which order copies to the GPU are enqueued, and that nothing else differs.

The order is recorded where copies are enqueued, and compared with one written out by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.axes.stream import Key, ParkedHalos
from parallel.axes.zero3 import FrozenShards, Unit, deepspeed_config
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.stream import StreamPlan, halo_bytes
from tests.numerics.test_streaming import make, step, text
from tests.support.single import single_groups

LAYERS, GROUP = 5, 16
FULL, POINTWISE = RecomputePolicy.FULL, RecomputePolicy.POINTWISE
POLICIES = (FULL, FULL, POINTWISE, FULL, POINTWISE)
SPEC = AttentionSpec("s2", GROUP)
OLD = ("early_halos",)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankModel]:
    folder = tmp_path_factory.mktemp("early")
    return make(folder, "llama3", num_hidden_layers=LAYERS, tie_word_embeddings=False, rope_scaling=None)


def shards(ahead: int = 2) -> FrozenShards:
    """Of one rank, in host memory."""
    return FrozenShards(single_groups(), True, deepspeed_config(torch.float32, 1, 1, 1), ahead)


def offloaded(build: Callable[..., RankModel], ahead: int = 2, without: Sequence[str] = ()) -> RankModel:
    """Two chunks of a group stream through it."""
    return build(POLICIES, GROUP, shards=shards(ahead), kinds=("lora", "embed", "norm"), without=without)


class Copies:
    """What was enqueued, in order: `w2` the weights of layer 2, `h2` its halo, `head` the output matrix."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.beyond = 0
        """The most bytes of other layers' halos that were there when a layer read its own."""

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within."""
        copy, read, fetch = ParkedHalos._copy, ParkedHalos.fetch, FrozenShards._fetch

        def copied(halos: ParkedHalos, key: Key) -> tuple[torch.Tensor, list[Any]]:
            self.order.append(f"h{key[0]}")
            return copy(halos, key)

        def given(halos: ParkedHalos, key: Key) -> tuple[torch.Tensor, list[Any]]:
            others = sum(packed.nbytes for other, (packed, _) in halos._coming.items() if other[0] != key[0])
            self.beyond = max(self.beyond, others)
            return read(halos, key)

        def fetched(frozen: FrozenShards, unit: Unit, keep: Sequence[Unit]) -> None:
            layer = unit.name.rpartition(".")[2]
            self.order.append(f"w{layer}" if layer.isdigit() else "head")
            fetch(frozen, unit, keep)

        with (
            mock.patch.object(ParkedHalos, "_copy", copied),
            mock.patch.object(ParkedHalos, "fetch", given),
            mock.patch.object(FrozenShards, "_fetch", fetched),
        ):
            yield


ORDERS = {
    # Forward through the first chunk, which has no halo, then the second; its backward, which finds the last layers at
    # hand, and of the layers that run again (3, 1, 0) asks for halos again; the first chunk, and its backward.
    (2, ()): """w0 w1 w2 w3 w4 head
        h0 h1 w0 w1 w2 h2 w3 h3 w4 h4 head
        h3 w2 w1 h1 w0 h0
        w3 w4 head
        w2 w1 w0""",
    (1, ()): """w0 w1 w2 w3 w4 head
        h0 h1 w0 w1 h2 w2 h3 w3 h4 w4 head
        h3 w3 w2 h1 w1 h0 w0
        w2 w3 w4 head
        w3 w2 w1 w0""",
    # Without it the halo of layer i comes behind the weights of layer i + 2.
    (2, OLD): """w0 w1 w2 w3 w4 head
        w0 w1 w2 h0 w3 h1 w4 h2 head h3 h4
        w2 w1 h3 w0 h1 h0
        w3 w4 head
        w2 w1 w0""",
}


@pytest.mark.parametrize(("ahead", "without"), ORDERS)
def test_a_halo_is_enqueued_before_the_weights_of_layers_beyond(
    build: Callable[..., RankModel], ahead: int, without: Sequence[str]
) -> None:
    model, copies = offloaded(build, ahead, without), Copies()
    with copies.recorded():
        step(model, text(1, 2 * GROUP), SPEC)
    assert copies.order == ORDERS[ahead, tuple(without)].split()


def test_it_takes_one_layers_halo_more_as_the_formula_says(build: Callable[..., RankModel]) -> None:
    """Of chunks off the group's multiples, whose halos differ."""
    batch, found = text(2, 67), {}
    for without in ((), OLD):
        model, copies = build(POLICIES, 24, without=without), Copies()
        with copies.recorded():
            step(model, batch, SPEC)
        cut = StreamPlan.of(67, 24, model.groups.plan)
        formula = halo_bytes(cut, model.arch, SPEC, model.groups.plan, 2, 4)
        found[without] = copies.beyond, len(copies.order)
        assert formula.fetched < formula.parked / LAYERS, "one chunk's halo, of two"
    assert found[()][0] == formula.fetched > found[OLD][0] == 0
    assert found[()][1] == found[OLD][1] > 0, "none is copied twice, or for nothing"


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens_at_once", [GROUP, 24, 9])
def test_gradients_are_the_same_bits(build: Callable[..., RankModel], tokens_at_once: int, documents: bool) -> None:
    """Engines, and orders of copies."""
    batch, found = text(2, 67, documents), []
    for sharded in (False, True):
        for without in ((), OLD):
            more = {"shards": shards(), "kinds": ("lora", "embed", "norm")} if sharded else {}
            found.append(step(build(POLICIES, tokens_at_once, without=without, **more), batch, SPEC))
    for loss, gradients in found[1:]:
        assert loss == found[0][0] and gradients.keys() == found[0][1].keys()
        assert all(torch.equal(gradient, found[0][1][name]) for name, gradient in gradients.items())


def test_a_step_abandoned_within_a_pass_leaves_nothing(build: Callable[..., RankModel]) -> None:
    """Whatever raises in the midst of a layer: halos on their way are forgotten, and the next step is right."""
    model, batch = offloaded(build), text(1, 48)
    _, expected = step(model, batch, SPEC)
    assert model.stream is not None
    parked, fetch = model.stream.parked, ParkedHalos.fetch

    def fails(halos: ParkedHalos, key: Key) -> tuple[torch.Tensor, list[Any]]:
        if key[0] == 2:
            raise InterruptedError
        return fetch(halos, key)

    # Of other tokens, or the halos left would be the right ones.
    with mock.patch.object(ParkedHalos, "fetch", fails), pytest.raises(InterruptedError):
        step(model, text(1, 47), SPEC)
    assert parked.coming == 2
    for parameter in model.parameters():
        parameter.grad = None
    _, found = step(model, batch, SPEC)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and parked.coming == 0
