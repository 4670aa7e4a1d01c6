"""Pipeline schedules: megatron-core's 1F1B and interleaved 1F1B around a forward function, and a forward-only relay.

Knows chunks and micro-batches; not what they compute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from parallel.axes.context import acquaint
from parallel.world.groups import Groups

Forward = Callable[[int, Any], torch.Tensor]
"""(micro-batch, chunk module) -> hidden states [S, B, H], or on the last chunk the scalar loss to differentiate."""


def run_schedule(
    groups: Groups,
    chunks: Sequence[torch.nn.Module],
    forward: Forward,
    micro_batches: int,
    tokens: int,
    rows: int,
    before_last_backward: Callable[[Any], None] = lambda chunk: None,
) -> None:
    """Forward and backward of every micro-batch through all pipeline chunks.

    The loss is differentiated as it is: no division by the number of micro-batches, tokens or context-parallel ranks.

    Args:
        chunks: this rank's, in order; their `set_input_tensor` gets the previous chunk's output.
        forward: called once a micro-batch and chunk.
        micro_batches: of this optimizer step.
        tokens: of a whole padded sequence.
        rows: sequences a micro-batch.
        before_last_backward: called with a chunk when its last micro-batch's backward begins; schedules take a chunk's
            micro-batches backwards in the order they went forwards.
    """

    def step(numbers: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        number = next(numbers)
        output = forward(number, chunk)
        if number == micro_batches - 1 and output.requires_grad:
            output.register_hook(lambda _: before_last_backward(chunk))
        # Three values and calculate_per_token_loss: the only form whose loss megatron leaves alone.
        return output, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=loss.device), {})

    virtual = len(chunks) if len(chunks) > 1 else None
    if virtual is not None and groups.plan.pp == 2 and not groups.fake:
        _acquaint_both_ways(groups)
    schedule = get_forward_backward_func(pp_size=groups.plan.pp, vp_size=virtual)
    schedule(
        forward_step_func=step,
        data_iterator=[iter(range(micro_batches)) for _ in chunks],
        model=list(chunks),
        num_microbatches=micro_batches,
        seq_length=tokens,
        micro_batch_size=rows,
        forward_only=False,
    )


_acquainted: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def _acquaint_both_ways(groups: Groups) -> None:
    """Make the two communicators that two interleaved stages exchange through, before anything else is under way.

    As megatron's `_p2p_ops` uses them: the pipeline's group from the even stage to the odd one, the world's back.
    """
    there, back = groups.collection.pp, groups.everyone
    if there in _acquainted:
        return
    other = groups.stage_rank(groups.stage + 1)
    sent, received = torch.zeros(2, 1, device=groups.device)
    first, second = (dist.isend, dist.irecv) if groups.stage == 0 else (dist.irecv, dist.isend)
    works = [
        call(sent if call is dist.isend else received, other, group=group)
        for call, group in ((first, there), (second, back))
    ]
    for work in works:
        assert work is not None, "this rank is of both groups"
        work.wait()
    _acquainted.add(there)


def _exchange(call: Callable[..., Any], tensor: torch.Tensor, peer: int, group: dist.ProcessGroup) -> None:
    """Send or receive through the group's own communicator: alone, NCCL would make one for the pair."""
    acquaint(group, tensor.device)
    for work in dist.batch_isend_irecv([dist.P2POp(call, tensor, peer, group)]):
        work.wait()


def relay(
    groups: Groups,
    chunks: Sequence[torch.nn.Module],
    forward: Callable[[Any], torch.Tensor],
    hidden_shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """One forward pass through the chunks in turn, without gradients.

    Args:
        forward: chunk -> its output, whose input was set by `set_input_tensor`.
        hidden_shape: of the states that travel.

    Returns:
        The last chunk's output on its rank, None elsewhere.
    """
    stages, stage = groups.plan.pp, groups.stage
    output: torch.Tensor | None = None
    with torch.no_grad():
        for number in range(stages * len(chunks)):
            if number % stages != stage:
                continue
            chunk: Any = chunks[number // stages]
            if number:
                received = torch.empty(tuple(hidden_shape), dtype=dtype, device=groups.device)
                _exchange(dist.irecv, received, groups.stage_rank(stage - 1), groups.collection.pp)
                chunk.set_input_tensor([received])
            output = forward(chunk)
            if number < stages * len(chunks) - 1:
                _exchange(dist.isend, output.contiguous(), groups.stage_rank(stage + 1), groups.collection.pp)
                output = None
    return output
