"""Streaming on a GPU: kernels, copies on a stream of their own, page-locked memory; and that memory stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from tests.numerics.movement import tensor_errors
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
