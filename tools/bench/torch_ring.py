"""torch's own ring attention (`torch.distributed.tensor.experimental`) as a function of local q, k and v.

The loops beneath `context_parallel` are called directly, without DTensor's dispatch: private names of torch 2.11.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

from pipeline.model.attention.backends import LseKernel

WAYS = ("alltoall", "allgather")
"""In which it rotates K and V."""
SEQUENCE_DIM = 2
"""The tokens' in [B, H, L, D]."""
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _Ring(torch.autograd.Function):
    """torch's ring attention, forward and backward, of this rank's zigzag tokens; q, k and v are [B, H, L, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: LseKernel, group: dist.ProcessGroup
    ) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5

        def op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> tuple[Any, ...]:
            return kernel.forward(query, key, value, named["is_causal"], scale)

        out, lse, *rest = torch_ring._templated_ring_attention(group, SEQUENCE_DIM, op, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        # What the last call's kernel gave besides; torch, too, hands it to the backward of all of them.
        ctx.rest, ctx.kernel, ctx.group, ctx.scale = tuple(rest), kernel, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors

        def op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> tuple[Any, ...]:
            merged = named["out"], named["logsumexp"]
            more = ctx.rest, named["is_causal"], ctx.scale
            return ctx.kernel.backward(named["grad_out"], query, key, value, *merged, *more)

        dq, dk, dv = torch_ring._templated_ring_attention_backward(
            ctx.group, SEQUENCE_DIM, op, dout, "grad_out", q, k, v, out, lse, True
        )
        return dq, dk, dv, None, None


def ring_attention(kernel: LseKernel, way: str, group: dist.ProcessGroup) -> Attention:
    """Full causal attention of this rank's tokens (`ring_tokens`), q, k and v [B, H, L, D].

    The way is global, and the backward reads it too: use one such function after the other.
    """
    assert torch_ring._cp_options.enable_load_balance, "torch's default"
    torch_ring.set_rotate_method(way)
    return lambda q, k, v: _Ring.apply(q, k, v, kernel, group)


def refuses(kernel: LseKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> bool:
    """Whether the kernel fails on one of the shapes that the ring's ranks call it with; why is told on stderr.

    Which of them a rank calls depends on its place. Nothing is sent; q, k, v and dout are [B, H, L, D].
    """
    q, k, v, dout = (tensor.detach() for tensor in (q, k, v, dout))
    half, scale = q.shape[SEQUENCE_DIM] // 2, q.shape[-1] ** -0.5
    first, second = (lambda x: x[:, :, :half]), (lambda x: x[:, :, half:])
    calls = (q, k, v, dout, True), (q, first(k), first(v), dout, False), (second(q), k, v, second(dout), False)
    try:
        for query, key, value, grad, causal in calls:
            out, lse, *rest = kernel.forward(query, key, value, causal, scale)
            kernel.backward(grad, query, key, value, out, lse, tuple(rest), causal, scale)
        if q.is_cuda:
            torch.cuda.synchronize()
    except (RuntimeError, ValueError, TypeError) as error:
        print(f"torch's ring with kernel {kernel.name}: {error}", file=sys.stderr, flush=True)
        return True
    return False


def ring_tokens(length: int, size: int, rank: int, device: torch.device) -> torch.Tensor:
    """Positions that rank holds under the ring's head-tail load balancer, int64 [length / size]."""
    balanced = _HeadTailLoadBalancer(length, size, device)._generate_indices()
    return balanced.view(size, length // size)[rank].long()
