"""Full attention whose queries move between context ranks, against its definition in fp64; on every size of group.

Of two, three (of which the middle one moves nothing) and four ranks. Beside the errors: that none moves where nothing
is to be gained, that every rank posts the same in one order, and faults planted in what comes home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from parallel.axes.context import Flight, GatherExchange, QueryExchange
from parallel.world.context_shard import ContextShard
from pipeline.model.attention.sharded import context_attend
from pipeline.planning.context_shards import query_moves
from tests.numerics import attention_oracle as oracle
from tests.numerics.test_context_parallel import DIM, Case, inputs, split, stack
from tests.support.ranks import run_ranks

WORLD = 4
CASES = [
    Case("two", 2, 13, 8, kind="full"),
    Case("two, one KV head, rows", 2, 9, 8, (5, 1), kind="full", batch=3),
    Case("two, re-entrant recompute", 2, 10, 8, kind="full", recompute=True),
    Case("three", 3, 11, 8, (6, 2), kind="full"),
    Case("three, recompute", 3, 7, 8, (9, 3), kind="full", batch=2, right=2, recompute=False),
    Case("three, documents", 3, 9, 8, kind="full", batch=2, documents=(14, 2, 11), left=3),
    Case("three, math kernel", 3, 8, 8, (4, 4), kind="full", backend="math", documents=(19, 9)),
    Case("three, a KV group cut by tensor ranks", 3, 8, 8, (9, 3), kind="full", local_heads=(1, 7)),
    Case("four", 4, 12, 8, kind="full"),
    Case("four, most is padding", 4, 9, 8, (6, 3), kind="full", batch=2, right=22),
    Case("four, a rank of padding alone first", 4, 6, 8, kind="full", left=7, recompute=False),
    Case("four, everything irregular", 4, 11, 8, (9, 3), kind="full", batch=2, left=5, right=9, documents=(21, 4)),
    Case("four, re-entrant recompute", 4, 8, 8, (4, 2), kind="full", recompute=True),
]
FAULTED = Case("faults", 4, 12, 8, (4, 2), kind="full")
"""Of which ranks 2 and 3 lend."""


def definition(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient) of the whole sequence, from a mask and a softmax in fp64."""
    total = case.size * case.tokens
    real, ids = np.ones((case.batch, total), bool), np.zeros((case.batch, total), int)
    for row, (cut, begun) in enumerate(zip(real, ids, strict=True)):
        edges = (case.layout().rows or ((0, total),) * case.batch)[row]
        cut[:] = False
        cut[edges[0] : edges[-1]] = True
        begun[:] = np.searchsorted(edges, np.arange(total), side="right")
    first, count = case.local_heads or (0, case.heads[0])
    mask = oracle.masks(case.batch, total, *case.heads, None, padding=real, documents=ids)[:, first : first + count]
    ratio = case.heads[0] // case.heads[1]

    def layer(fused: torch.Tensor) -> torch.Tensor:
        q, k, v = split(case, fused)
        # Each local query head beside the local KV head that it reads, also where a group is cut.
        at = torch.tensor([(first + head) // ratio - first // ratio for head in range(count)])
        return oracle.attention(q, k[:, :, at], v[:, :, at], mask)

    fused, weight = inputs(case)
    fused.requires_grad_()
    out = stack(replace(case, recompute=None), fused, layer)
    (out * weight).sum().backward()
    assert fused.grad is not None
    return out.detach(), fused.grad


def run(case: Case, shard: ContextShard, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient) of this rank's shard."""
    layout, (fused, weight) = case.layout(), inputs(case)
    own = fused[shard.start : shard.stop].to(dtype).requires_grad_()
    out = stack(case, own, lambda x: context_attend(*split(case, x), layout, case.spec(), case.plan(), shard))
    (out * weight[shard.start : shard.stop].to(dtype)).sum().backward()
    assert own.grad is not None
    return out.detach().double(), own.grad.double()


def errors(found: Sequence[torch.Tensor], case: Case, shard: ContextShard) -> tuple[float, ...]:
    """Of output and gradient, in norm over the definition's norm of the whole."""
    at = slice(shard.start, shard.stop)
    pairs = zip(found, definition(case), strict=True)
    return tuple(float((ours - theirs[at]).norm() / theirs.norm()) for ours, theirs in pairs)


def faults() -> dict[str, Any]:
    """By name, a `QueryExchange.send` or `GatherExchange.send_back` that is wrong."""
    send, send_back = QueryExchange.send, GatherExchange.send_back

    def wrong(home: bool, back: bool, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def sent(self: QueryExchange, parts: Sequence[torch.Tensor], like: torch.Tensor, **way: bool) -> Flight:
            hit = way.get("home", False) == home and way.get("back", False) == back
            return send(self, [change(part) for part in parts] if hit else parts, like, **way)

        return mock.patch.object(QueryExchange, "send", sent)

    def swapped() -> Any:
        def sent(self: QueryExchange, parts: Sequence[torch.Tensor], like: torch.Tensor, **way: bool) -> Flight:
            flight = send(self, parts, like, **way)
            if way.get("home") and not way.get("back"):
                flight.arriving = [torch.cat((part[1:], part[:1])) for part in flight.wait()]
                flight.works = []
            return flight

        return mock.patch.object(QueryExchange, "send", sent)

    def forgotten(self: GatherExchange, grads: Sequence[torch.Tensor], like: torch.Tensor) -> Flight:
        """The gradients of keys that borrowed queries see do not count."""
        own = 2 * sum(read.stop <= self.shard.start for read in self.reads)
        kept = [grad if index < own else torch.zeros_like(grad) for index, grad in enumerate(grads)]
        return send_back(self, kept, like)

    return {
        "outputs come home a token late": swapped(),
        "queries leave in the wrong order": wrong(False, False, lambda part: part.flip(0)),
        "dq missing": wrong(True, True, torch.zeros_like),
        "gradients of outputs missing": wrong(False, True, torch.zeros_like),
        "dk and dv of borrowed queries missing": mock.patch.object(GatherExchange, "send_back", forgotten),
    }


@contextmanager
def posts() -> Iterator[list[str]]:
    """What this rank posts to the group, in order: each rank must post the same, or NCCL waits for ever."""
    told: list[str] = []
    send = QueryExchange.send

    def sent(self: QueryExchange, parts: Sequence[torch.Tensor], like: torch.Tensor, **way: bool) -> Flight:
        told.append(" ".join(["queries", *(word for word, on in way.items() if on)]))
        return send(self, parts, like, **way)

    def logged(name: str) -> Any:
        call = getattr(dist, name)

        def collective(*args: Any, **options: Any) -> Any:
            told.append(name)
            return call(*args, **options)

        return mock.patch.object(dist, name, collective)

    with (
        mock.patch.object(QueryExchange, "send", sent),
        logged("all_gather_into_tensor"),
        logged("reduce_scatter_tensor"),
    ):
        yield told


def order(shard: ContextShard, reentrant: bool | None) -> list[str]:
    """Posts of one layer, perhaps within a checkpoint."""
    case = Case("order", shard.size, shard.tokens, 8, kind="full")
    layout, (fused, _) = case.layout(), inputs(case)
    own = fused[shard.start : shard.stop].clone().requires_grad_()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return context_attend(*split(case, x), layout, case.spec(), case.plan(), shard)

    with posts() as told:
        out = layer(own) if reentrant is None else checkpoint(layer, own, use_reentrant=reentrant)
        out.square().sum().backward()
    return told


def kept(case: Case, shard: ContextShard) -> int:
    """Bytes that one layer's attention saves for its backward."""
    layout, (fused, _) = case.layout(), inputs(case)
    own, storages = fused[shard.start : shard.stop].clone().requires_grad_(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = context_attend(*split(case, own), layout, case.spec(), case.plan(), shard)
    del out
    return sum(storages.values())


def partly_frozen(shard: ContextShard) -> dict[str, float]:
    """Errors where queries alone have a gradient, where keys and values alone, and of what nobody trains."""
    case = replace(FAULTED, size=shard.size, name="frozen")
    layout, (fused, weight) = case.layout(), inputs(case)
    at, found = slice(shard.start, shard.stop), {}
    args = (layout, case.spec(), case.plan())
    still = (layout, replace(case.spec(), lend_from=None), case.plan())
    for names in ("q", "kv"):
        grads = []
        for with_moves in (args, still):
            tensors = [x[at].detach().clone() for x in split(case, fused)]
            leaves = tensors[:1] if names == "q" else tensors[1:]
            for leaf in leaves:
                leaf.requires_grad_()
            out = context_attend(*tensors, *with_moves, shard)
            grads.append([out.detach(), *torch.autograd.grad(out, leaves, weight[at, :, : out.shape[2]])])
        found[names] = max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))
    return found


def work(rank: int, world: int) -> dict[str, Any]:
    """All cases; groups of two and three leave ranks out, which go on to the next size."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for size in (2, 3, 4):
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for case in (case for case in CASES if case.size == size):
            shard = ContextShard(group, rank, size, case.tokens)
            found[case.name] = errors(run(case, shard), case, shard)
        for reentrant in (None, False, True):
            found["order", size, reentrant] = order(ContextShard(group, rank, size, 12), reentrant)
        found["frozen", size] = partly_frozen(ContextShard(group, rank, size, FAULTED.tokens))
        if size == 4:
            shard = ContextShard(group, rank, size, FAULTED.tokens)
            for name, fault in faults().items():
                with fault:
                    found["fault", name] = errors(run(FAULTED, shard), FAULTED, shard)
            still = replace(FAULTED, lend_from=None)
            found["kept"] = [kept(case, shard) for case in (FAULTED, still)]
            for dtype in (torch.float32, torch.bfloat16):
                both = [errors(run(case, shard, dtype), FAULTED, shard) for case in (FAULTED, still)]
                found["rounding", dtype] = both
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[Any, Any]]:
    """What four ranks found."""
    return run_ranks(work, WORLD, timeout=200)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition(results: list[dict[Any, Any]], case: Case) -> None:
    assert query_moves(case.layout(), case.spec(), case.size, case.tokens).moves, "the case must move something"
    for rank in range(case.size):
        assert max(results[rank][case.name]) <= 1e-12, f"rank {rank}: {results[rank][case.name]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_as_much_as_without(results: list[dict[Any, Any]], dtype: torch.dtype) -> None:
    """Errors of all ranks together, against those of contiguous shards."""
    balanced, still = np.array([found["rounding", dtype] for found in results]).transpose(1, 0, 2)
    balanced, still = (np.sqrt((one**2).sum(0)) for one in (balanced, still))
    assert (balanced <= (1e-6 if dtype is torch.float32 else 2 * still)).all(), (balanced, still)
    assert (still > 1e-8).all()


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_posts_the_same_in_one_order(
    results: list[dict[Any, Any]], size: int, reentrant: bool | None
) -> None:
    """Forward, its repetition within the backward, and the backward itself, whatever a rank has to move."""
    ahead = ["all_gather_into_tensor"] * 2 + ["queries", "queries home"]
    back = ["queries back", "queries home back"] + ["reduce_scatter_tensor"] * 2
    expected = ahead * (1 if reentrant is None else 2) + back
    assert all(results[rank]["order", size, reentrant] == expected for rank in range(size))
    case = Case("order", size, 12, 8, kind="full")
    if size == 3:
        moves = query_moves(case.layout(), case.spec(), size, 12)
        assert not moves.lent(1) and not moves.borrowed(1), "the middle rank has the mean's work"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_only_what_needs_a_gradient_gets_one(results: list[dict[Any, Any]], size: int) -> None:
    for rank in range(size):
        assert max(results[rank]["frozen", size].values()) <= 1e-12


def test_a_worker_keeps_queries_outputs_and_log_sum_exps(results: list[dict[Any, Any]]) -> None:
    """As the memory formula counts them; the first rank, which read no earlier keys, keeps those gathered as well."""
    moved = query_moves(FAULTED.layout(), FAULTED.spec(), FAULTED.size, FAULTED.tokens)
    borrowed, (heads, kv_heads) = sum(move.tokens for move in moved.borrowed(0)), FAULTED.heads
    gathered = 2 * FAULTED.size * FAULTED.tokens * kv_heads * DIM
    balanced, still = results[0]["kept"]
    assert balanced - still == 8 * (gathered + borrowed * heads * (2 * DIM + 1))


@pytest.mark.parametrize("fault", list(faults()))
def test_faults_are_seen(results: list[dict[Any, Any]], fault: str) -> None:
    """In the gradient at least; in the output too where it is the forward that is wrong."""
    out, grad = (max(found["fault", fault][which] for found in results) for which in (0, 1))
    assert grad > 1e-4, (out, grad)
    assert (out > 1e-4) is ("outputs come" in fault or "queries leave" in fault)
