"""The chunked cross entropy against torch's on whole logits."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.packing import IGNORE
from pipeline.model.layers import loss as loss_module
from pipeline.model.layers.loss import scored_tokens, sum_cross_entropy, token_losses


@pytest.mark.parametrize("tokens", [1, 129, 700])
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("alone", [False, True], ids=["all", "the scored alone"])
def test_sum_and_gradients(
    tokens: int, trains: tuple[bool, bool], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 128 * 50)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 16, dtype=torch.float32, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (tokens,), generator=generator)
    labels[::3] = IGNORE if tokens > 1 else labels[0]
    ours = [hidden.clone().requires_grad_(trains[0]), weight.clone().requires_grad_(trains[1])]
    theirs = [hidden.double().requires_grad_(trains[0]), weight.double().requires_grad_(trains[1])]
    scored = scored_tokens(labels) if alone else None
    assert tokens == 1 or not alone or (scored is not None and len(scored) == tokens - len(range(0, tokens, 3)))
    found = sum_cross_entropy(ours[0], ours[1], labels, scored=scored)
    expected = torch.nn.functional.cross_entropy(
        theirs[0] @ theirs[1].t(), labels, ignore_index=IGNORE, reduction="sum"
    )
    (found / 7).backward()
    (expected / 7).backward()
    assert abs(found.item() - expected.item()) <= 1e-5 * abs(expected.item())
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.grad is None) == (reference.grad is None)
        if mine.grad is not None and reference.grad is not None:
            assert (mine.grad.double() - reference.grad).norm() <= 1e-5 * reference.grad.norm()
    each = token_losses(hidden, weight, labels)
    assert abs(each.sum().item() - expected.item()) <= 1e-5 * abs(expected.item())
    assert (each[labels == IGNORE] == 0).all()


def test_bf16_gradients_are_scaled_by_the_whole_slope() -> None:
    """1/3001 in bf16 is 0.16% too large; rounding each element is not biased like that."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((700, 16), (50, 16)))
    labels = torch.randint(0, 50, (700,), generator=generator)
    found = []
    for slope in (1.0, 1 / 3001):
        ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        (sum_cross_entropy(ours[0], ours[1], labels) * slope).backward()
        found.append([tensor.grad for tensor in ours])
    for whole, scaled in zip(*found, strict=True):
        assert whole is not None and scaled is not None and scaled.dtype == torch.bfloat16
        assert torch.equal(scaled, (whole.float() / 3001).bfloat16())


@pytest.mark.parametrize("alone", [False, True])
def test_nothing_to_score_is_zero_not_nan(alone: bool) -> None:
    hidden, labels = torch.randn(5, 8, requires_grad=True), torch.full((5,), IGNORE)
    total = sum_cross_entropy(hidden, torch.randn(9, 8), labels, scored=scored_tokens(labels) if alone else None)
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None and hidden.grad.shape == (5, 8) and hidden.grad.abs().max() == 0


def test_tokens_that_nearly_all_count_are_taken_together() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    labels[:9] = IGNORE
    assert scored_tokens(labels) is None
    labels[:11] = IGNORE
    found = scored_tokens(labels)
    assert found is not None and found.tolist() == list(range(11, 100))
