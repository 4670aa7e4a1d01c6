"""Context-parallel attention on real processes equals one process: forward, gradients, bytes, order, a planted fault.

One launch of eight ranks serves every size: as one group of 8, two of 4 and four of 2, so that ranks within a group
differ from global ones and ranks without anything to send occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from parallel.axes.context import HaloExchange
from parallel.axes.halo_plan import Region
from parallel.errors import ConfigError
from parallel.world.context_shard import ByteMeter, ContextShard
from pipeline.model.attention import sharded
from pipeline.model.attention.local import attend
from pipeline.model.attention.sharded import context_attend
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout, head_plan
from tests.support.halos import halo_bytes, halo_formula
from tests.support.ranks import run_ranks

LAYERS, DIM = 2, 8


@dataclass(frozen=True)
class Case:
    """A two-layer stack of attention on `size` ranks."""

    name: str
    size: int
    tokens: int
    """L, of a shard."""
    group: int
    heads: tuple[int, int] = (8, 4)
    rule: str = "upper_half"
    kind: str = "s2"
    batch: int = 1
    left: int = 0
    """Padding of row 0 on its left."""
    right: int = 0
    """Padding of every row on the right."""
    documents: tuple[int, ...] = ()
    """Document lengths of row 0 (the last one repeats); row 1's are shifted by three tokens."""
    backend: str = "auto"
    recompute: bool | None = None
    """use_reentrant of the checkpoint around each layer; None: no checkpoint."""
    local_heads: tuple[int, int] | None = None
    """(first, count) of a tensor-parallel rank's query heads."""
    lend_from: int | None = 0
    """`AttentionSpec.lend_from`; 0: full attention's queries move wherever ranks are uneven."""

    def layout(self) -> SequenceLayout:
        total = self.size * self.tokens
        mask = np.ones((self.batch, total), bool)
        mask[0, : self.left] = False
        mask[:, total - self.right :] = False
        ids = np.zeros((self.batch, total), int)
        if self.documents:
            lengths = [*self.documents, *[self.documents[-1]] * total]
            row = np.repeat(np.arange(len(lengths)), lengths)
            for index in range(self.batch):
                ids[index] = row[3 * index : 3 * index + total]
        return SequenceLayout.build(self.batch, total, mask, ids)

    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.kind, self.group, self.rule, backend=self.backend, lend_from=self.lend_from)

    def plan(self) -> HeadPlan:
        first, count = self.local_heads or (0, self.heads[0])
        return head_plan(first, count, *self.heads, self.rule)

    def formula_applies(self) -> bool:
        return self.kind == "s2" and not self.left and not self.documents


CASES = [
    # L a multiple of G/2: the farthest hop is one
    Case("halo is one shard", 2, 12, 24),
    Case("8 ranks, CP = 2N/G", 8, 6, 12),
    Case("8 ranks, alternate", 8, 6, 12, rule="alternate"),
    Case("math kernel, masked", 4, 8, 16, backend="math"),
    # not a multiple
    Case("group fits no shard", 2, 13, 10, (6, 2)),
    Case("all heads shifted", 4, 6, 12, rule="all"),
    Case("no head shifted", 4, 6, 12, rule="none"),
    Case("group fits no shard, 4", 4, 11, 14, rule="alternate", batch=2),
    # shards shorter than the reach: several owners
    Case("several hops", 4, 5, 32, (4, 2)),
    Case("several hops, 8", 8, 3, 20, batch=2),
    Case("several hops, math", 8, 2, 30, (4, 4), backend="math"),
    Case("one token a shard", 8, 1, 6, (4, 2)),
    # heads
    Case("a KV head straddles the split", 4, 7, 10, (9, 3)),
    Case("a KV head straddles, several hops", 8, 3, 20, (9, 3), batch=2),
    Case("one KV head", 2, 10, 8, (5, 1), batch=2),
    Case("no GQA", 2, 10, 12, (4, 4)),
    Case("a tensor-parallel slice", 4, 6, 12, (8, 2), local_heads=(2, 4)),
    # rows, documents, padding
    Case("batch of 3", 2, 9, 12, batch=3),
    Case("documents", 4, 9, 16, batch=2, documents=(5, 19, 2, 30)),
    Case("documents, 8", 8, 5, 16, (9, 3), batch=2, documents=(13, 3, 18)),
    Case("left padding", 4, 8, 12, batch=2, left=11),
    Case("right padding", 4, 8, 12, batch=2, right=5),
    Case("last shards are padding", 8, 4, 12, batch=2, right=10),
    Case("everything irregular", 4, 9, 10, (9, 3), batch=2, left=4, right=11, documents=(7, 12)),
    Case("one rank holds all", 4, 8, 16, right=24),
    # recompute
    Case("re-entrant recompute", 4, 7, 12, recompute=True),
    Case("recompute", 4, 7, 12, recompute=False),
    Case("re-entrant recompute, padded", 8, 3, 8, (9, 3), batch=2, right=7, recompute=True),
    Case("recompute, padded", 8, 3, 8, (9, 3), batch=2, right=7, recompute=False),
    # full attention
    Case("full", 2, 9, 8, (9, 3), kind="full", batch=2),
    Case("full, 8 irregular", 8, 4, 8, kind="full", batch=2, left=3, right=9, documents=(9, 14)),
    Case("full, nothing moves", 4, 5, 8, kind="full", lend_from=None),
    Case("full, math kernel, masked", 4, 6, 8, (6, 2), kind="full", backend="math"),
    Case("full, a KV group cut by tensor ranks", 4, 7, 8, (9, 3), kind="full", local_heads=(2, 4)),
    Case("full, a long document first", 4, 9, 8, kind="full", batch=2, documents=(20, 3)),
    Case("full, even documents", 4, 8, 8, kind="full", documents=(4, 4)),
    Case("full, padded", 8, 6, 8, (6, 2), kind="full", batch=2, left=7, right=13),
    Case("full, one rank holds all", 4, 8, 8, kind="full", right=24),
    Case("full, recompute", 4, 5, 8, kind="full", recompute=False),
    Case("full, re-entrant recompute", 4, 5, 8, kind="full", right=6, recompute=True),
]


def split(case: Case, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v as strided views of a fused projection."""
    last = case.plan().full_blocks[-1]
    return fused.split([last.q_stop, last.kv_stop, last.kv_stop], 2)


def stack(case: Case, fused: torch.Tensor, layer: Any) -> torch.Tensor:
    """`LAYERS` attention layers, each one's output mixed into the next one's q, k and v."""
    for _ in range(LAYERS):
        if case.recompute is None:
            out = layer(fused)
        else:
            out = checkpoint(layer, fused, use_reentrant=case.recompute)
        fused = torch.tanh(fused + out.repeat(1, 1, 3, 1)[:, :, : fused.shape[2]].flip(2))
    return fused


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused q, k, v of the whole sequence and the loss's weights, the same on every rank."""
    last = case.plan().full_blocks[-1]
    shape = (case.size * case.tokens, case.batch, last.q_stop + 2 * last.kv_stop, DIM)
    generator = torch.Generator().manual_seed(len(case.name))
    fused, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return fused, weight


def parallel_run(case: Case, shard: ContextShard) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient) of this rank's shard."""
    layout, (fused, weight) = case.layout(), inputs(case)
    own = fused[shard.start : shard.stop].clone().requires_grad_()
    out = stack(case, own, lambda x: context_attend(*split(case, x), layout, case.spec(), case.plan(), shard))
    (out * weight[shard.start : shard.stop]).sum().backward()
    assert own.grad is not None
    return out.detach(), own.grad


def single_run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient) of the whole sequence in one process."""
    layout, (fused, weight) = case.layout(), inputs(case)
    fused.requires_grad_()
    out = stack(case, fused, lambda x: attend(*split(case, x), layout, case.spec(), case.plan()))
    (out * weight).sum().backward()
    assert fused.grad is not None
    return out.detach(), fused.grad


def errors(case: Case, shard: ContextShard) -> tuple[float, float]:
    """Largest absolute error of output and of gradient."""
    pairs = zip(parallel_run(case, shard), single_run(case), strict=True)
    out, grad = ((ours - theirs[shard.start : shard.stop]).abs().max().item() for ours, theirs in pairs)
    return out, grad


def expected_bytes(case: Case, rank: int) -> ByteMeter:
    """What the plan says all layers and passes move."""
    args = (case.layout(), case.spec(), case.plan(), case.size, case.tokens, DIM, 8)
    sent, received = halo_bytes(*args)[rank]
    forward = LAYERS * (1 if case.recompute is None else 2)
    return ByteMeter(forward * sent, forward * received, LAYERS * received, LAYERS * sent)


def one_token_early(self: HaloExchange, piece: Region) -> tuple[slice, slice, slice]:
    """The fault: the owner takes its halo one token too early."""
    start = piece.start - self.shard.start - 1
    assert start >= 0
    return (
        slice(start, start + piece.shape[0]),
        slice(piece.row_start, piece.row_stop),
        slice(piece.head_start, piece.head_stop),
    )


def order_of_events(shard: ContextShard, recompute: bool) -> list[str]:
    """What happens, in order, in one layer's forward and backward, perhaps within a non-reentrant checkpoint."""
    case, events = Case("order", 2, 12, 16), []
    exchange_calls = {name: getattr(HaloExchange, name) for name in ("send", "receive", "send_back", "receive_back")}

    def logged(name: str) -> Any:
        def call(*args: Any) -> Any:
            events.append(name)
            return exchange_calls[name](*args)

        return call

    def hooked(name: str, function: Any) -> Any:
        def call(*args: Any) -> torch.Tensor:
            events.append(name)
            out = function(*args)
            out.register_hook(lambda grad: events.append(f"{name} back"))
            return out

        return call

    layout, (fused, _) = case.layout(), inputs(case)
    own = fused[shard.start : shard.stop].clone().requires_grad_()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return context_attend(*split(case, x), layout, case.spec(), case.plan(), shard)

    with mock.patch.multiple(HaloExchange, **{name: logged(name) for name in exchange_calls}):
        with (
            mock.patch.object(sharded, "attend_block", hooked("local", sharded.attend_block)),
            mock.patch.object(sharded, "attend_straddling", hooked("straddling", sharded.attend_straddling)),
        ):
            if recompute:
                out = checkpoint(layer, own, use_reentrant=False)
            else:
                out = layer(own)
            out.square().sum().backward()
    return [event for index, event in enumerate(events) if index == 0 or events[index - 1] != event]


def without_gradients(shard: ContextShard) -> dict[str, float]:
    """Errors where k and v need no gradient, and where nothing does."""
    case = Case("order", 2, 12, 16)
    layout, (fused, weight) = case.layout(), inputs(case)
    q, k, v = split(case, fused)
    at = slice(shard.start, shard.stop)
    own, whole = q[at].clone().requires_grad_(), q.clone().requires_grad_()
    args = (layout, case.spec(), case.plan())
    out, expected = context_attend(own, k[at], v[at], *args, shard), attend(whole, k, v, *args)
    (grad,) = torch.autograd.grad(out, own, weight[at, :, : q.shape[2]])
    (expected_grad,) = torch.autograd.grad(expected, whole, weight[:, :, : q.shape[2]])
    with torch.no_grad():
        bare = context_attend(own, k[at], v[at], *args, shard)
    return {
        "out": (out - expected[at]).abs().max().item(),
        "dq": (grad - expected_grad[at]).abs().max().item(),
        "no_grad": (bare - out).abs().max().item(),
        "sent back": float(shard.meter.sent_back + shard.meter.received_back),
    }


def work(rank: int, world: int) -> dict[str, Any]:
    """All cases; those of smaller groups are dealt out among the groups of their size."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for size in (2, 4, 8):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        mine = rank // size
        group, inner = groups[mine], rank % size
        for index, case in enumerate(case for case in CASES if case.size == size):
            if index % len(groups) != mine:
                continue
            shard = ContextShard(group, inner, size, case.tokens)
            found[case.name] = {"errors": errors(case, shard), "meter": shard.meter}
        if size == 2:
            for recompute in (False, True):
                found["order", recompute] = order_of_events(ContextShard(group, inner, 2, 12), recompute)
            found["frozen"] = without_gradients(ContextShard(group, inner, 2, 12))
            # Every halo token is seen by every query that sees any, so only other tokens show, not another order.
            case = Case("group fits no shard", 2, 13, 10, (6, 2))
            with mock.patch.object(HaloExchange, "local_slices", one_token_early):
                found["fault"] = errors(case, ContextShard(group, inner, 2, case.tokens))
            with pytest.raises(ConfigError) as caught:
                wrapped = AttentionSpec("s2", 10, legacy_wrap=True)
                q, k, v = split(case, inputs(case)[0][:13])
                context_attend(q, k, v, case.layout(), wrapped, case.plan(), ContextShard(group, inner, 2, 13))
            found["wrap"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """What eight ranks found, by global rank."""
    return run_ranks(work, 8, timeout=200)


def of_case(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The findings about a case, by rank within its group."""
    return [found[name] for found in results if name in found]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(results: list[dict[str, Any]], case: Case) -> None:
    found = of_case(results, case.name)
    assert len(found) == case.size
    for rank, one in enumerate(found):
        assert max(one["errors"]) <= 1e-10, f"rank {rank}: output and gradient are off by {one['errors']}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_moved_are_those_of_plan_and_formula(results: list[dict[str, Any]], case: Case) -> None:
    for rank, one in enumerate(of_case(results, case.name)):
        assert one["meter"] == expected_bytes(case, rank), f"rank {rank}"
    if case.formula_applies():
        real = case.size * case.tokens - case.right
        formula = halo_formula(real, case.batch, case.group, case.plan(), case.size, case.tokens, DIM, 8)
        args = (case.layout(), case.spec(), case.plan(), case.size, case.tokens, DIM, 8)
        assert tuple(received for _, received in halo_bytes(*args)) == formula
        assert case.right >= (case.size - 1) * case.tokens or any(formula), "the case must move something"


def test_local_work_is_done_while_the_halo_flies_both_ways(results: list[dict[str, Any]]) -> None:
    first, second = results[0]["order", False], results[1]["order", False]
    assert first == ["send", "local", "receive", "send_back", "local back", "receive_back"]
    assert second == [
        "send",
        "local",
        "receive",
        "straddling",
        "straddling back",
        "send_back",
        "local back",
        "receive_back",
    ]


def test_recompute_exchanges_in_the_same_order_on_every_rank(results: list[dict[str, Any]]) -> None:
    """NCCL runs a rank's transfers in the order posted: a rank without a halo must not post its backward's first."""
    exchanges = {"send", "receive", "send_back", "receive_back"}
    for rank in (0, 1):
        events = [event for event in results[rank]["order", True] if event in exchanges]
        assert events == ["send", "receive", "send", "receive", "send_back", "receive_back"], f"rank {rank}"


def test_frozen_keys_and_inference(results: list[dict[str, Any]]) -> None:
    for found in results[:2]:
        assert max(found["frozen"].values()) <= 1e-12, "errors, and bytes of gradients that nobody needs"


def test_a_halo_shifted_by_one_token_is_caught(results: list[dict[str, Any]]) -> None:
    """The fault makes the same comparison fail: outputs of the reading rank, gradients of the owner."""
    assert results[1]["fault"][0] > 1e-3
    assert results[0]["fault"][1] > 1e-3


def test_legacy_wrap_is_refused(results: list[dict[str, Any]]) -> None:
    assert results[0]["wrap"].startswith("attention.legacy_wrap: the published roll")
