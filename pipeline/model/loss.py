"""Next-token cross entropy from hidden states, without ever holding [tokens, vocabulary].

Logits exist for one chunk of tokens at a time. When gradients are wanted the chunk's are computed in the same visit
(softmax minus one-hot), so that the backward only scales stored gradients: the output matrix is read once, not twice.

Shapes: T tokens, H hidden, V local vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORE = -100
"""Label of a token that is not scored (PyTorch's convention)."""

CHUNK_LOGITS = 1 << 26
"""Logits held at once (fp32: 256 MiB), which sets the chunk's tokens for a vocabulary."""


def _chunk_tokens(vocabulary: int) -> int:
    return max(128, CHUNK_LOGITS // vocabulary)


def token_losses(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token in nats, fp32 [T], 0 where the label is IGNORE; no gradients."""
    losses = torch.zeros(labels_T.shape, dtype=torch.float32, device=hidden_TH.device)
    step = _chunk_tokens(weight_VH.shape[0])
    with torch.no_grad():
        for start in range(0, hidden_TH.shape[0], step):
            piece = slice(start, start + step)
            logits = (hidden_TH[piece] @ weight_VH.t()).float()
            losses[piece] = torch.nn.functional.cross_entropy(
                logits, labels_T[piece], ignore_index=IGNORE, reduction="none"
            )
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over scored tokens of the cross entropy of softmax(h W^T), with its gradients computed in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        grad_hidden = torch.zeros_like(hidden_TH) if wants_hidden else None
        # Summed over chunks in fp32: a bf16 sum over hundreds of chunks would lose the small contributions.
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        step = _chunk_tokens(weight_VH.shape[0])
        for start in range(0, hidden_TH.shape[0], step):
            piece = slice(start, start + step)
            labels = labels_T[piece]
            scored = labels != IGNORE
            target = labels.clamp_min(0).unsqueeze(1)
            logits = (hidden_TH[piece] @ weight_VH.t()).float()
            normalizer = torch.logsumexp(logits, dim=1)
            picked = logits.gather(1, target).squeeze(1)
            total += torch.where(scored, normalizer - picked, 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            slope = logits.sub_(normalizer.unsqueeze(1)).exp_()
            slope.scatter_add_(1, target, slope.new_full((), -1.0).expand_as(target))
            slope = (slope * scored.unsqueeze(1)).to(hidden_TH.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight_VH, out=grad_hidden[piece])
            if grad_weight is not None:
                grad_weight += slope.t() @ hidden_TH[piece]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (slope,) = upstream
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * slope.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * slope.to(grad_weight.dtype),
            None,
        )


def sum_cross_entropy(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Sum of the scored tokens' cross entropy in nats, fp32 scalar, differentiable in hidden states and weight.

    Args:
        hidden_TH: [T, H], any float dtype; logits are formed in it and reduced in fp32.
        weight_VH: [V, H] output matrix, same dtype.
        labels_T: int64 [T]; IGNORE is not scored, and a batch with nothing to score gives 0, not NaN.
    """
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T)
