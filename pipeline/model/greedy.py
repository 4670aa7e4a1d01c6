"""Greedy decoding on any grid and engine that trains, from the forward pass that scores.

A window's end is guessed; one forward gives the arg max after each of its tokens. As far as guess and arg max agree,
both are what greedy decoding writes, and the arg max after the last of these is one token more. So each forward finds a
token at least, and all of a good guess at once; the arg maxes behind the first wrong token are the next guess (Jacobi
decoding, arXiv 2305.10427). The prompt passes once and leaves its keys and values in host memory, as in `prefill`; only
the end is run again.

Shapes: B prompts, S tokens of a window, prompt and what may be written together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipeline.data.loader import Batch
from pipeline.data.packing import IGNORE
from pipeline.model.chunk import LlamaChunk
from pipeline.model.rank_model import RankModel
from pipeline.model.streaming import padded_layout
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.stream import StreamPlan, cut_for_greedy


@torch.no_grad()
def greedy(
    model: RankModel,
    prompts: Sequence[Sequence[int]],
    new: int,
    spec: AttentionSpec,
    ended: Callable[[int, list[int]], bool] = lambda row, written: False,
    guesses: Sequence[Sequence[int]] = (),
    goes_on: Callable[[bool], bool] = lambda mine: mine,
    among: Sequence[int] = (),
) -> list[list[int]]:
    """What greedy decoding writes after each prompt; collective over the ranks of a replica, which are given the same.

    Args:
        model: in evaluation mode.
        prompts: B lists of ids, none empty.
        new: ids to write at most.
        spec: full attention.
        ended: (row, ids so far) -> whether nothing more is wanted of it, asked after each id.
        guesses: of each row, what may come; the result does not depend on it, only the number of forwards.
        goes_on: asked before each forward whether there is one, given whether a row here is not done. Where replicas
            must run equally often (engine zero3) it asks all of them.
        among: tokens of all replicas' prompts, where they must run equally often; empty: of these.

    Returns:
        ids of each row; the last is the one at which `ended` said so.
    """
    grid, device = model.groups.plan, model.groups.device
    lengths = [len(prompt) for prompt in prompts]
    among = among or lengths
    size = max(among) + new
    tokens = torch.zeros(len(prompts), size, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE)
    for row, prompt in enumerate(prompts):
        likely = list(guesses[row])[:new] if guesses else []
        tokens[row, : lengths[row] + len(likely)] = torch.tensor([*prompt, *likely])
        labels[row, lengths[row] - 1 : lengths[row] - 1 + new] = 0  # the arg max is wanted there
    cut = cut_for_greedy(min(among), size, model.prefill, grid)
    window = model.arch.sliding_window
    if window is not None and size > window and model.prefill is None:
        # Beyond its window a model is not computed in chunks: all of it again for every token that was not guessed.
        cut = StreamPlan.of(size, grid.cp * grid.shard_tokens(size), grid)
    batch = Batch(tokens, labels, None)
    layout = padded_layout(batch, cut.padded)
    *fixed, end = model.chunks_of(cut)
    begin = cut.starts[-1]
    everything = torch.zeros(3, len(prompts), cut.padded, device=device)
    for past in fixed:
        model.score_chunk(batch, past, layout, spec, LlamaChunk.scores_of, everything)
    written: list[list[int]] = [[] for _ in prompts]
    left = set(range(len(prompts))) if new else set()
    while goes_on(bool(left)):
        found = everything[..., begin:].zero_()
        model.score_chunk(batch, end, layout, spec, LlamaChunk.scores_of, everything)
        best = model.gathered(found[2].contiguous()).long().cpu()
        for row in sorted(left):
            at = lengths[row]
            while True:
                place = at + len(written[row])
                token = int(best[row, place - 1 - begin])
                agreed = int(tokens[row, place]) == token
                tokens[row, place] = token
                written[row].append(token)
                if len(written[row]) == new or ended(row, written[row]):
                    left.discard(row)
                    break
                if not agreed:
                    tokens[row, place + 1 : at + new] = best[row, place - begin : at + new - 1 - begin]
                    break
    return written
