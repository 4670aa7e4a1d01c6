"""The chunked cross entropy against torch's on whole logits."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.packing import IGNORE
from pipeline.model.layers import loss as loss_module
from pipeline.model.layers.loss import sum_cross_entropy, token_losses


@pytest.mark.parametrize("tokens", [1, 129, 700])
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
def test_sum_and_gradients(tokens: int, trains: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 128 * 50)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 16, dtype=torch.float32, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (tokens,), generator=generator)
    labels[::3] = IGNORE if tokens > 1 else labels[0]
    ours = [hidden.clone().requires_grad_(trains[0]), weight.clone().requires_grad_(trains[1])]
    theirs = [hidden.double().requires_grad_(trains[0]), weight.double().requires_grad_(trains[1])]
    found = sum_cross_entropy(ours[0], ours[1], labels)
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


def test_nothing_to_score_is_zero_not_nan() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    total = sum_cross_entropy(hidden, torch.randn(9, 8), torch.full((5,), IGNORE))
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None and hidden.grad.abs().max() == 0
