"""Streaming on a GPU: kernels, copies on a stream of their own, page-locked memory; and that memory stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from parallel.axes.stream import ParkedHalos
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from tests.numerics.movement import tensor_errors
from tests.numerics.test_early_halos import OLD, shards
from tests.numerics.test_streaming import make, step, text

pytestmark = pytest.mark.gpu

GROUP = 512


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankModel]:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    return make(tmp_path_factory.mktemp("narrow"), "llama3", torch.bfloat16, **sizes)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk", [GROUP, 1000, GROUP // 2])
def test_gradients_on_kernels(narrow: Callable[..., RankModel], chunk: int, documents: bool) -> None:
    """bf16, streamed: no further from fp32 than twice the unstreamed step."""
    spec, batch = AttentionSpec("s2", GROUP), text(2, 4099, documents)
    _, expected = step(narrow().float(), batch, spec)
    loss, plain = step(narrow(), batch, spec)
    streamed_loss, streamed = step(narrow(stream=chunk), batch, spec)
    assert streamed_loss == pytest.approx(loss, rel=1e-3)
    allowed, found = (tensor_errors(each, expected, None) for each in (plain, streamed))
    assert max(allowed.values()) < 0.2
    for name, error in found.items():
        assert error <= 2 * allowed[name] + 1e-3, (name, error, allowed[name])


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_halos_among_weights_from_host_memory(narrow: Callable[..., RankModel], recompute: str) -> None:
    """Both come on one stream, or halos on their own: the same loss, and gradients as near to fp32."""
    spec, batch, losses = AttentionSpec("s2", GROUP), text(2, 4099), []
    _, expected = step(narrow().float(), batch, spec)
    allowed = tensor_errors(step(narrow(), batch, spec)[1], expected, None)
    for without in ((), OLD):
        model = narrow(recompute, GROUP, shards=shards(), kinds=("lora", "embed", "norm"), without=without)
        for _ in range(2):
            loss, streamed = step(model, batch, spec)
            losses.append(loss)
            for name, error in tensor_errors(streamed, expected, None).items():
                assert error <= 2 * allowed[name] + 1e-3, (name, error, allowed[name])
        model.close()
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)


SLEEP = 200_000_000
"""Cycles: a tenth of a second."""


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("held_up", ["to the host", "to the GPU"])
def test_a_halo_is_read_once_it_is_there(shared: bool, held_up: str) -> None:
    """However late a copy runs, and however soon the memory of what was parked is another tensor's."""
    parked = ParkedHalos(torch.device("cuda"), torch.cuda.Stream() if shared else None)
    halo = torch.arange(1 << 20, dtype=torch.float32, device="cuda")
    with torch.cuda.stream(parked._stream if held_up == "to the host" else torch.cuda.current_stream()):
        torch.cuda._sleep(SLEEP)
    parked.park((0, 0, 1), halo)
    del halo
    others = [torch.full((1 << 20,), -1.0, device="cuda") for _ in range(4)]
    with torch.cuda.stream(parked._inbound if held_up == "to the GPU" else torch.cuda.current_stream()):
        torch.cuda._sleep(SLEEP)
    parked.bring((0, 0, 1))
    packed, works = parked.fetch((0, 0, 1))
    for work in works:
        work.wait()
    assert torch.equal(packed, torch.arange(1 << 20, dtype=torch.float32, device="cuda"))
    assert all(bool((other == -1).all()) for other in others)
    parked.close()


def test_a_copy_that_nobody_waits_for_writes_to_no_other_tensor() -> None:
    """A step is abandoned while a halo is on its way."""
    inbound = torch.cuda.Stream()
    parked = ParkedHalos(torch.device("cuda"), inbound)
    parked.park((0, 0, 1), torch.zeros(1 << 24, device="cuda"))
    torch.cuda.synchronize()
    with torch.cuda.stream(inbound):
        torch.cuda._sleep(SLEEP)
    parked.bring((0, 0, 1))
    place = parked._coming[0, 0, 1][0].data_ptr()
    parked.begin()
    others = [torch.full((1 << 24,), 7.0, device="cuda") for _ in range(3)]
    assert place in [other.data_ptr() for other in others], "the case needs the same memory"
    torch.cuda.synchronize()
    assert all(bool((other == 7).all()) for other in others)
    parked.close()


def test_chunked_prefill_on_kernels(narrow: Callable[..., RankModel]) -> None:
    ids = torch.randint(3, 128, (1, 4099), generator=torch.Generator().manual_seed(0))
    full = AttentionSpec("full", 2)
    whole, chunked = (model.eval().token_nll(ids, full) for model in (narrow(), narrow(prefill=700)))
    exact = narrow().float().eval().token_nll(ids, full)
    assert float((chunked - exact).abs().mean()) <= 2 * float((whole - exact).abs().mean()) + 1e-4


def test_memory_does_not_grow_with_the_sequence(narrow: Callable[..., RankModel]) -> None:
    """8 and 128 chunks: peaks within 2% of each other."""
    model, spec, peaks = narrow(stream=2 * GROUP), AttentionSpec("s2", GROUP), []
    for chunks in (8, 128, 8, 128):  # the first round finds kernels and memory
        batch = text(1, chunks * 2 * GROUP)
        torch.cuda.reset_peak_memory_stats()
        step(model, batch, spec)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[3] <= 1.02 * peaks[2]
    model.close()
