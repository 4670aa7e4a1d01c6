"""Keys in two tensors: every way to attend to them against the definition, on the CPU and on a GPU in half precision.

The exchange is simulated in one process (one GPU suffices): each shard in turn reads its halo from the whole K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from parallel.axes.context import Flight
from parallel.axes.halo_plan import Region
from parallel.world.context_shard import ContextShard
from pipeline.model.attention import local, sharded
from pipeline.model.attention.backends import Backend, attend_pieces, select_backend
from pipeline.model.attention.local import attend_straddling
from pipeline.model.attention.sharded import context_attend
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from tests.numerics import attention_oracle as oracle
from tests.numerics.test_s2_gpu import backend_or_skip

CPU = torch.device("cpu")
Tensors = tuple[torch.Tensor, ...]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Bottom-right causal softmax of q [B, S, Hq, D] over k, v [B, T + S, Hkv, D], in fp64."""
    ratio, early = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = k.repeat_interleave(ratio, 2), v.repeat_interleave(ratio, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    sees = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(early)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), v)


def straddling_inputs(
    batch: int, queries: int, early: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensors, torch.Tensor]:
    """(q, early k, early v, own k, own v) as the views that a shard and a receive buffer give, and a loss's weights."""
    generator = torch.Generator(device).manual_seed(queries + early)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    fused = random(queries, batch, heads + 2 * kv_heads, dim)
    q, own_k, own_v = (x.transpose(0, 1) for x in fused.split([heads, kv_heads, kv_heads], 2))
    early_k, early_v = (x.transpose(0, 1) for x in random(2, early, batch, kv_heads, dim))
    # A large early score somewhere: the merge must not rely on both parts having similar log-sum-exps.
    early_k = early_k * torch.linspace(0.1, 3, early, device=device).to(dtype)[None, :, None, None]
    tensors = tuple(x.detach().requires_grad_() for x in (q, early_k, early_v, own_k, own_v))
    return tensors, random(*q.shape)


def straddling_errors(tensors: Tensors, weight: torch.Tensor, out: torch.Tensor, scale: float) -> dict[str, float]:
    """Relative errors (in norm) of out and gradients against the definition in fp64."""
    grads = torch.autograd.grad(out, tensors, weight)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    q, early_k, early_v, own_k, own_v = exact
    reference = expected(q, torch.cat((early_k, own_k), 1), torch.cat((early_v, own_v), 1), scale)
    references = torch.autograd.grad(reference, exact, weight.double())
    names = ("out", "dq", "early dk", "early dv", "own dk", "own dv")
    return {
        name: float((ours.double() - theirs).norm() / theirs.norm())
        for name, ours, theirs in zip(names, (out.detach(), *grads), (reference.detach(), *references), strict=True)
    }


SHAPES = [  # batch, queries, early keys, query heads, KV heads
    (1, 12, 7, 4, 4),
    (2, 5, 30, 8, 2),
    (3, 9, 1, 9, 3),
    (1, 1, 6, 5, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_merged_by_log_sum_exp_are_the_whole(shape: tuple[int, ...]) -> None:
    tensors, weight = straddling_inputs(*shape, 8, torch.float64, CPU)
    (kernel,) = select_backend("auto", CPU, torch.float64, 8).lse
    found = straddling_errors(tensors, weight, attend_pieces(*tensors, kernel, 0.4), 0.4)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", ["pieces", "masked", "varlen"])
def test_every_path_of_a_straddling_segment(shape: tuple[int, ...], path: str) -> None:
    math = select_backend("math", CPU, torch.float64, 8)

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        """A plain loop in place of the CUDA kernel."""
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert rest[:2] == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        parts = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False)
        return torch.cat([expected(q[None, a:b], k[None, c:d], v[None, c:d], rest[2])[0] for a, b, c, d in parts])

    backend = {
        "pieces": select_backend("auto", CPU, torch.float64, 8),
        "masked": math,
        "varlen": Backend("varlen", math.dense, varlen),
    }[path]
    tensors, weight = straddling_inputs(*shape, 8, torch.float64, CPU)
    found = straddling_errors(tensors, weight, attend_straddling(*tensors, backend, 0.4), 0.4)
    assert max(found.values()) < 1e-12, found


class Simulated:
    """An exchange within one process: reads from the whole K and V, collects the gradients of what was read."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, reads: Sequence[Region], grads: list[torch.Tensor]) -> None:
        self.whole, self.reads, self.grads = (k, v), reads, grads

    def send(self, k: torch.Tensor, v: torch.Tensor) -> Flight:
        return Flight([], [], [])

    def receive(self, flight: Flight) -> list[torch.Tensor]:
        return [x[self.slices(read)].contiguous() for read in self.reads for x in self.whole]

    def send_back(self, grads: Sequence[torch.Tensor], like: torch.Tensor) -> Flight:
        for index, grad in enumerate(grads):
            self.grads[index % 2][self.slices(self.reads[index // 2])] += grad
        return Flight([], [], [])

    def receive_back(self, flight: Flight, dk: torch.Tensor, dv: torch.Tensor) -> None:
        pass

    @staticmethod
    def slices(read: Region) -> tuple[slice, slice, slice]:
        rows, heads = slice(read.row_start, read.row_stop), slice(read.head_start, read.head_stop)
        return slice(read.start, read.stop), rows, heads


def shards_errors(
    spec: AttentionSpec,
    size: int,
    tokens: int,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    irregular: bool,
) -> dict[str, float]:
    """Relative errors of all shards' outputs and gradients together, against the definition in fp64."""
    spec = replace(spec, lend_from=None)  # queries move between processes only
    total = size * tokens
    mask, ids = np.ones((batch, total), bool), np.zeros((batch, total), int)
    if irregular:
        mask[0, :3] = mask[:, total - tokens - 2 :] = False
        ids[:] = np.arange(total) // max(2, int(tokens * 1.7))
    layout, plan = SequenceLayout.build(batch, total, mask, ids), head_plan(0, heads, heads, kv_heads, "upper_half")
    generator = torch.Generator(device).manual_seed(5)
    fused, weight = (
        torch.randn(total, batch, count, dim, generator=generator, device=device).to(dtype)
        for count in (heads + 2 * kv_heads, heads)
    )
    widths = [heads, kv_heads, kv_heads]
    whole_k, whole_v = (x.contiguous() for x in fused.split(widths, 2)[1:])
    sent_back = [torch.zeros_like(whole_k), torch.zeros_like(whole_v)]
    outs, grads = [], []
    for rank in range(size):
        shard = ContextShard(mock.Mock(), rank, size, tokens)
        own = fused[shard.start : shard.stop].clone().requires_grad_()

        def exchange(*args: Any) -> Simulated:
            return Simulated(whole_k, whole_v, args[-1], sent_back)

        with mock.patch.object(sharded, "_exchange", exchange):
            out = context_attend(*own.split(widths, 2), layout, spec, plan, shard)
        (grad,) = torch.autograd.grad(out, own, weight[shard.start : shard.stop])
        outs.append(out.detach())
        grads.append(grad)
    dq, dk, dv = torch.cat(grads).double().split(widths, 2)
    ours = (torch.cat(outs).double(), dq, dk + sent_back[0].double(), dv + sent_back[1].double())

    exact = [x.double().requires_grad_() for x in fused.split(widths, 2)]
    group = spec.group if spec.kind == "s2" else None
    sees = oracle.masks(batch, total, heads, kv_heads, group, "upper_half", mask, ids)
    reference = oracle.attention(*exact, sees)
    theirs = (reference, *torch.autograd.grad(reference, exact, weight.double()))
    names = ("out", "dq", "dk", "dv")
    return {
        name: float((a - b.detach()).norm() / b.detach().norm()) for name, a, b in zip(names, ours, theirs, strict=True)
    }


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("kind", ["s2", "full"])
@pytest.mark.parametrize("backend", ["auto", "math"])
def test_simulated_shards_equal_the_definition(backend: str, kind: str, irregular: bool) -> None:
    spec = AttentionSpec(kind, 14, backend=backend)
    found = shards_errors(spec, 4, 9, 2, 9, 3, 8, torch.float64, CPU, irregular)
    assert max(found.values()) < 1e-12, found


@pytest.mark.gpu
@pytest.mark.timeout(1200)  # flash-attn 4 compiles its kernels
@pytest.mark.parametrize("name", ["cudnn", "flash", "flash_attn_2", "flash_attn_4"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_straddling_in_half_precision(name: str, dim: int, dtype: torch.dtype) -> None:
    """Each log-sum-exp kernel that should run does, and is as exact as one kernel over joined keys; so is varlen."""
    device = torch.device("cuda", 0)
    backend = backend_or_skip(name, dtype, dim)
    # bf16 rounds at 2^-9, fp16 at 2^-12; the merge rounds once more than one kernel does.
    bound = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    assert backend.varlen is not None and backend.lse
    for shape in ((1, 300, 200, 8, 2), (2, 128, 384, 9, 3), (1, 77, 1, 5, 1), (1, 512, 1000, 8, 8)):
        tensors, weight = straddling_inputs(*shape, dim, dtype, device)
        scale = dim**-0.5
        for kernel in backend.lse:
            views = [x.transpose(1, 2) for x in (tensors[0], tensors[1], tensors[3])]
            if not (kernel.runs(views[0], views[1], False) and kernel.runs(views[0], views[2], True)):
                assert shape[2] == 1, f"{kernel.name} refuses {shape}"  # cuDNN may refuse a single key
                continue
            found = straddling_errors(tensors, weight, attend_pieces(*tensors, kernel, scale), scale)
            assert max(found.values()) < bound, (kernel.name, shape, found)
        joined = Backend("varlen", backend.dense, backend.varlen)
        found = straddling_errors(tensors, weight, attend_straddling(*tensors, joined, scale), scale)
        assert max(found.values()) < bound, ("varlen", shape, found)


@pytest.mark.gpu
@pytest.mark.timeout(1200)  # flash-attn 4 compiles its kernels
@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("kind", ["s2", "full"])
@pytest.mark.parametrize("name", ["auto", "cudnn", "flash", "flash_attn_2", "flash_attn_4"])
def test_simulated_shards_in_half_precision_make_no_mask(name: str, kind: str, irregular: bool) -> None:
    backend_or_skip(name, torch.bfloat16, 64)
    device = torch.device("cuda", 0)
    real = local.attend_block

    def unmasked(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert rest[1].edges is not None or q.shape[1] == k.shape[1], "this call builds a mask"
        return real(q, k, *rest)

    with mock.patch.object(local, "attend_block", unmasked):
        for size, tokens, group in ((4, 64, 128), (4, 70, 96), (8, 40, 150)):
            spec = AttentionSpec(kind, group, backend=name)
            found = shards_errors(spec, size, tokens, 2, 8, 2, 64, torch.bfloat16, device, irregular)
            assert max(found.values()) < 1.5e-2, (size, tokens, group, found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simulated_shards_in_full_precision_on_cuda(dtype: torch.dtype) -> None:
    found = shards_errors(AttentionSpec("s2", 96), 4, 70, 2, 9, 3, 64, dtype, torch.device("cuda", 0), True)
    assert max(found.values()) < (1e-4 if dtype == torch.float32 else 1e-12), found


@pytest.mark.gpu
def test_no_copy_of_keys_at_the_70b_shape() -> None:
    """A rank's straddling half of the heads, 70B at 32k over 8: the two-piece path's peak memory is counted.

    4096 queries of 32 heads over 8192 keys; a mask would be 32 MiB in bool and its fp bias 64 MiB, scores 2 GiB.
    """
    device = torch.device("cuda", 0)
    tensors, weight = straddling_inputs(1, 4096, 4096, 32, 4, 128, torch.bfloat16, device)
    backend = select_backend("auto", device, torch.bfloat16, 128)
    assert backend.lse[0].runs(tensors[0].transpose(1, 2), tensors[1].transpose(1, 2), False)
    attend_straddling(*tensors, backend, 128**-0.5)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        attend_straddling(*tensors, backend, 128**-0.5)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    # Two outputs in bf16 (32 MiB each), both in fp32 and their blend (64 each), the result (32); workspace aside.
    assert peak < 400 * 2**20, f"{peak / 2**20:.0f} MiB"
