"""The last tokens of long windows, read with a given context before them: what a longer context wins on the very same
tokens.

Shapes: W windows, S tokens of a window, C tokens of context.
"""

from __future__ import annotations

import torch

from pipeline.evaluation.perplexity import TokenNll
from pipeline.evaluation.spread import Shards, turns


def tail_spans(length: int, tail: int, context: int, stride: int) -> list[tuple[int, int]]:
    """[begin, end) of what the model reads to score each next `stride` of a window's last `tail` tokens.

    Every reading holds at most `context` tokens, those scored included.
    """
    if not 1 <= stride <= tail < length or stride >= context:
        raise ValueError(f"stride {stride}, tail {tail}, length {length} and context {context} do not fit")
    ends = [*range(length - tail + stride, length, stride), length]
    return [(max(0, end - context), end) for end in ends]


def tail_nll(
    nll: TokenNll, windows_WS: torch.Tensor, tail: int, context: int, stride: int, shards: Shards | None = None
) -> list[float]:
    """Mean negative log-likelihood of the last `tail` tokens of each window, nats.

    A token has at least `context - stride` tokens before it, and `context - 1` at most.

    Args:
        nll: the model.
        windows_WS: int64 [W, S].
        tail: tokens scored, at the windows' end.
        context: tokens the model may read at once; S or more: the whole window.
        stride: tokens scored by a reading.
        shards: how windows are spread over data-parallel ranks.
    """
    shards = shards or Shards()
    count, length = windows_WS.shape
    spans = tail_spans(length, tail, min(context, length), stride)
    sums = torch.zeros(count, dtype=torch.float64, device=windows_WS.device)
    for index, mine in turns(count, shards):
        window, scored = windows_WS[index], length - tail
        for begin, end in spans:
            losses = nll(window[begin:end].unsqueeze(0))[0, -(end - scored) :]
            if mine:
                sums[index] += losses.double().sum()
            scored = end
    return [float(value) / tail for value in shards.all_reduce_sum(sums).cpu()]
