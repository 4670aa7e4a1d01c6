"""What stands in for the other ranks' data under a fake process group, and what of the memory it takes is not real."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.world import lone_rank
from parallel.world.grid import plan_grid
from parallel.world.groups import make_groups
from parallel.world.rank_env import RankEnv
from tests.support.single import single_groups

from megatron.core.tensor_parallel import mappings  # isort: skip  # not before `parallel.world.groups`


def _group() -> dist.ProcessGroup:
    return make_groups(plan_grid(4, 4, 1, 1), RankEnv(1, 4, launched=True), fake=True).collection.tp


def test_a_gather_has_memory_of_its_own_and_numbers_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lone_rank, "_numbers", {})
    monkeypatch.setattr(lone_rank, "_periods", {})
    group = _group()
    assert lone_rank.numbers_bytes() == 0
    (small, _), (large, _) = (lone_rank.all_gather(torch.zeros(rows, 3), group) for rows in (2, 5))
    assert small.shape == (8, 3) and large.shape == (20, 3)
    assert large.isfinite().all() and 0.5 < float(large.std()) < 2, "no power is saved on zeros"
    # A real gather's memory, besides the numbers: both may be alive at once.
    own = [view.buffer for view in (small, large)]  # type: ignore[attr-defined]
    assert [buffer.shape for buffer in own] == [small.shape, large.shape]
    assert own[0].data_ptr() != own[1].data_ptr()
    again, work = lone_rank.all_gather(torch.zeros(5, 3), group)
    assert again.data_ptr() == large.data_ptr() and lone_rank.numbers_bytes() == large.nbytes and work is None
    lone_rank.all_gather(torch.zeros(5, 3, dtype=torch.bfloat16), group)
    assert lone_rank.numbers_bytes() == large.nbytes + large.nbytes // 2


def test_sums_have_one_ranks_share_in_megatrons_collectives_too() -> None:
    group = _group()
    partial, own = torch.randn(8, 3), torch.full((2, 3), torch.nan)
    assert lone_rank.reduce_scatter(own, partial, group) is None
    assert torch.equal(own, partial[:2])
    assert torch.equal(mappings.reduce_scatter_to_sequence_parallel_region(partial, group=group), partial[:2])
    # Its gradient there is gathered: of every rank the same.
    low = torch.randn(2, 3, requires_grad=True)
    (mappings.gather_from_sequence_parallel_region(low, group=group) * partial).sum().backward()
    assert low.grad is not None and torch.equal(low.grad, partial[:2])


def test_a_real_gather_gets_a_plain_buffer() -> None:
    before = lone_rank.numbers_bytes()
    whole, work = lone_rank.all_gather(torch.ones(2, 3), single_groups().collection.tp)
    assert work is not None
    work.wait()
    assert torch.equal(whole, torch.ones(2, 3)) and not hasattr(whole, "buffer") and lone_rank.numbers_bytes() == before


@pytest.mark.parametrize("period", [100, 1 << 22])
def test_bytes_of_several_dtypes_are_gathered_as_numbers_of_each(monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    """torch's fake group would repeat a rank's own bytes, whatever lies there: NaN."""
    monkeypatch.setattr(lone_rank, "_PERIOD", period)
    monkeypatch.setattr(lone_rank, "_periods", {})
    group = _group()
    whole = torch.full((4 * 1024,), 0xFF, dtype=torch.uint8)  # e4m3's, bf16's and fp32's NaN
    mine = whole[1024:2048]
    mine[:] = 7
    parts = [
        whole[:2560].view(torch.float8_e4m3fn),
        whole[2560:3072].view(torch.float32),
        whole[3072:].view(torch.bfloat16),
    ]
    assert lone_rank.all_gather_shares(whole, mine, parts, group) is None
    assert all(part.float().isfinite().all() for part in parts) and (mine == 7).all()
    for part, deviation in zip(parts, (1, 0.02, 0.02), strict=True):
        found = torch.cat([part[: 1024 // part.element_size()], part[-256 // part.element_size() :]]).float().std()
        assert 0.5 * deviation < float(found) < 2 * deviation
    before = whole.clone()
    lone_rank.all_gather_shares(whole, mine, [], group)
    assert torch.equal(whole, before), "numbers of the same kinds stay"
