"""Next-token cross entropy from hidden states, without ever holding [tokens, vocabulary].

Logits exist for one chunk of tokens at a time. When gradients are wanted the chunk's are computed in the same visit
(softmax minus one-hot), so that the backward only scales stored gradients: the output matrix is read once, not twice.

Under tensor parallelism each rank holds some rows of the output matrix, and of the scores only per-token maxima and
sums travel (Megatron-LM, arXiv 1909.08053, section 3). Hidden states are sharded along the tokens there; a chunk of
them is gathered, and its gradients summed and scattered, while the next or last one is computed with. Labels IGNORE and
ids of other ranks are handled alike.

Shapes: T tokens, L of them this rank's own (all without tensor parallelism), C tokens of a chunk, H hidden, V local
vocabulary rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.axes.tensor import TokenTiles
from pipeline.data.packing import IGNORE

CHUNK_LOGITS = 1 << 25
"""Logits held at once (fp32: 128 MiB), which sets the chunk's tokens for a vocabulary."""
LEAST_TOKENS = 128
"""Tokens of a chunk at least."""
MOST_SCORED = 0.9
"""Share of scored tokens up to which the others are left out of the products with the output matrix."""


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows one tensor-parallel rank holds."""

    group: dist.ProcessGroup
    start: int
    """First row's token id."""
    rows: int
    """Rows that are tokens; what lies beyond in the weight is padding and never scored."""


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, shard: VocabShard | None) -> torch.Tensor:
    """Logits of one chunk, fp32 [C, V]; -inf in the columns that only pad the vocabulary."""
    logits = (hidden_CH @ weight_VH.t()).float()
    if shard is not None and shard.rows < logits.shape[1]:
        logits[:, shard.rows :] = -math.inf
    return logits


def _greedy(logits: torch.Tensor, shard: VocabShard | None) -> torch.Tensor:
    """The token of the largest logit over the whole vocabulary, int64 [C]; among equals the smallest id, as argmax."""
    best = logits.argmax(dim=1)
    if shard is None:
        return best
    own = logits.gather(1, best[:, None])[:, 0]
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    best = torch.where(own == largest, best + shard.start, torch.iinfo(torch.int64).max)
    dist.all_reduce(best, dist.ReduceOp.MIN, group=shard.group)
    return best


def _normalize(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, labels_C: torch.Tensor, shard: VocabShard | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_normalized` of a chunk's logits."""
    return _normalized(_logits(hidden_CH, weight_VH, shard), labels_C, shard)


def _normalized(
    logits: torch.Tensor, labels_C: torch.Tensor, shard: VocabShard | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of one chunk, and what their gradient needs. The logits are overwritten.

    Returns:
        losses fp32 [C]; exp(logit - max) fp32 [C, V] (local columns); its sum over the vocabulary fp32 [C, 1]; the
        labels' local column, int64 [C], V where another rank (or nobody) holds it.
    """
    columns = logits.shape[1]
    local = labels_C if shard is None else labels_C - shard.start
    rows = columns if shard is None else shard.rows
    local = torch.where((local >= 0) & (local < rows), local, columns)
    largest = logits.amax(dim=1, keepdim=True)
    if shard is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    logits -= largest
    picked = torch.where(local < columns, logits.gather(1, local.clamp_max(columns - 1)[:, None])[:, 0], 0.0)
    powers = logits.exp_()
    # One collective for both sums over the vocabulary.
    sums = torch.stack((powers.sum(dim=1), picked))
    if shard is not None:
        dist.all_reduce(sums, group=shard.group)
    losses = torch.where(labels_C != IGNORE, sums[0].log() - sums[1], 0.0)
    return losses, powers, sums[0][:, None], local


def _tiles(hidden_LH: torch.Tensor, weight_VH: torch.Tensor, shard: VocabShard | None) -> TokenTiles:
    group = None if shard is None else shard.group
    # Two chunks of gathered hidden states and two of their gradients exist beside the logits.
    width = weight_VH.shape[0] if shard is None else max(weight_VH.shape)
    return TokenTiles(group, hidden_LH.shape[0], max(LEAST_TOKENS, CHUNK_LOGITS // width))


def token_losses(
    hidden_LH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, shard: VocabShard | None = None
) -> torch.Tensor:
    """Negative log-likelihood of each token in nats, fp32 [T], 0 where the label is IGNORE; no gradients.

    Args:
        shard: as in `sum_cross_entropy`; every rank gets all losses.
    """
    losses = torch.zeros(labels_T.shape, dtype=torch.float32, device=hidden_LH.device)
    tiles = _tiles(hidden_LH, weight_VH, shard)
    with torch.no_grad():
        gathered = tiles.gather(hidden_LH)
        for span in tiles.spans:
            tiles.write(losses, span, _normalize(next(gathered), weight_VH, tiles.read(labels_T, span), shard)[0])
    return losses


def token_scores(
    hidden_LH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, shard: VocabShard | None = None
) -> torch.Tensor:
    """Of each token its loss in nats, as `token_losses`, 1 if greedy decoding picks it, and which token that picks.

    All are 0 where the label is IGNORE; chunks without a scored token are passed over.

    Returns:
        fp32 [3, T] (exact for vocabularies below 2^24); every rank gets all of it.
    """
    scores = torch.zeros(3, *labels_T.shape, dtype=torch.float32, device=hidden_LH.device)
    tiles = _tiles(hidden_LH, weight_VH, shard)
    with torch.no_grad():
        gathered = tiles.gather(hidden_LH)
        for span in tiles.spans:
            hidden_CH, labels_C = next(gathered), tiles.read(labels_T, span)
            if not bool((labels_C != IGNORE).any()):
                continue
            logits = _logits(hidden_CH, weight_VH, shard)
            del hidden_CH
            best_C = _greedy(logits, shard)
            tiles.write(scores[1], span, (best_C == labels_C).float())
            tiles.write(scores[2], span, torch.where(labels_C == IGNORE, 0, best_C).float())
            tiles.write(scores[0], span, _normalized(logits, labels_C, shard)[0])
    return scores


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over scored tokens of the cross entropy of softmax(h W^T), with its gradients computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        shard: VocabShard | None,
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden_LH.device)
        grad_hidden = torch.empty_like(hidden_LH, memory_format=torch.contiguous_format) if wants_hidden else None
        # Summed over chunks in fp32: a bf16 sum over hundreds of chunks would lose the small contributions.
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        columns = weight_VH.shape[0]
        tiles = _tiles(hidden_LH, weight_VH, shard)
        scatter = None if grad_hidden is None else tiles.scatter(grad_hidden)
        gathered = tiles.gather(hidden_LH)
        for span in tiles.spans:
            hidden_CH, labels_C = next(gathered), tiles.read(labels_T, span)
            losses, slope, sums, local = _normalize(hidden_CH, weight_VH, labels_C, shard)
            total += losses.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            slope /= sums
            held = (local < columns).to(slope.dtype)[:, None]
            slope.scatter_add_(1, local.clamp_max(columns - 1)[:, None], -held)
            slope *= (labels_C != IGNORE)[:, None]
            slope = slope.to(hidden_LH.dtype)
            if scatter is not None:
                scatter.put(span, torch.mm(slope, weight_VH, out=scatter.target(span)))
            if grad_weight is not None:
                grad_weight += slope.t() @ hidden_CH
            del hidden_CH
        if scatter is not None:
            scatter.finish()
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (slope,) = upstream
        # Scaled in place: a copy of [L, H] would be the step's memory peak. A second backward is refused by autograd,
        # which sees that a saved tensor was modified. In fp32 whatever the gradient's type: rounded to bf16, the slope
        # (1/tokens) would put all gradients off by one factor. One element, not none: it is then no mere scalar whose
        # type gives way.
        gradients = [None if grad is None else grad.mul_(slope.float().reshape(1)) for grad in ctx.saved_tensors]
        return gradients[0], gradients[1], None, None


def scored_tokens(labels_T: torch.Tensor) -> torch.Tensor | None:
    """Which tokens are scored, int64, at least one; None: so many that leaving the others out would gain nothing.

    Args:
        labels_T: in host memory: of a GPU's labels it would have to be waited for.
    """
    scored = (labels_T != IGNORE).nonzero()[:, 0]
    if len(scored) > MOST_SCORED * len(labels_T):
        return None
    return scored if len(scored) else scored.new_zeros(1)


def sum_cross_entropy(
    hidden_LH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    shard: VocabShard | None = None,
    scored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the scored tokens' cross entropy in nats, fp32 scalar, differentiable in hidden states and weight.

    Args:
        hidden_LH: [L, H], any float dtype; logits are formed in it and reduced in fp32.
        weight_VH: [V, H] output matrix, or this rank's rows of it, same dtype.
        labels_T: int64 [T]; IGNORE is not scored, and a batch with nothing to score gives 0, not NaN.
        shard: under tensor parallelism, which rows `weight_VH` holds; rank r of the group then gives tokens
            [r L, (r + 1) L) and all the labels. Every rank gets the whole loss and its own tokens' whole gradient.
        scored: `scored_tokens`, to leave out the others; only without `shard`.
    """
    if scored is not None:
        assert shard is None, "a rank of several has other tokens than labels"
        hidden_LH, labels_T = hidden_LH.index_select(0, scored), labels_T.index_select(0, scored)
    return _LinearCrossEntropy.apply(hidden_LH, weight_VH, labels_T, shard)
