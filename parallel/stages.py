"""Pipeline schedules: megatron-core's 1F1B and interleaved 1F1B around a forward function, and a forward-only relay.

Knows chunks and micro-batches; not what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from parallel.groups import Groups

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
                dist.recv(received, groups.stage_rank(stage - 1), group=groups.collection.pp)
                chunk.set_input_tensor([received])
            output = forward(chunk)
            if number < stages * len(chunks) - 1:
                dist.send(output.contiguous(), groups.stage_rank(stage + 1), group=groups.collection.pp)
                output = None
    return output
