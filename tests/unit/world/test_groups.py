"""Megatron's process groups are those of the plan's one reshape, on every rank, and another order is noticed."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel.errors import ConfigError
from parallel.world.grid import GridPlan
from parallel.world.groups import check_groups, destroy_groups, make_groups
from parallel.world.rank_env import RankEnv


@pytest.mark.parametrize("plan", [GridPlan(2, 2, 2, 2), GridPlan(4, 1, 3, 1), GridPlan(1, 4, 1, 2)], ids=str)
def test_every_rank_has_the_groups_of_the_plan(plan: GridPlan) -> None:
    """torch's fake process group stands in for the world: nothing is sent."""
    for rank in range(plan.world_size):
        groups = make_groups(plan, RankEnv(rank, plan.world_size, launched=True), fake=True)
        tp, cp, dp, pp = plan.coordinates(rank)
        assert dist.get_process_group_ranks(groups.collection.tp) == [plan.rank(i, cp, dp, pp) for i in range(plan.tp)]
        assert dist.get_process_group_ranks(groups.collection.cp) == [plan.rank(tp, i, dp, pp) for i in range(plan.cp)]
        assert dist.get_process_group_ranks(groups.replicas) == [plan.rank(tp, cp, i, pp) for i in range(plan.dp)]
        assert groups.stage == pp and groups.data_rank == dp
        destroy_groups()


def test_every_group_has_the_time_out_that_was_asked_for() -> None:
    """Megatron's own would be half an hour, whatever init_process_group was told."""
    make_groups(GridPlan(1, 1, 1, 1), RankEnv(), timeout_s=77.5)
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in dist.distributed_c10d._world.pg_map]
    assert len(found) > 3 and set(found) == {datetime.timedelta(seconds=77.5)}


def test_more_processes_than_gpus_are_refused_before_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK is 2, and this process sees 2 GPUs: start one process a GPU"):
        make_groups(GridPlan(1, 1, 4, 1), RankEnv(2, 4, 2, launched=True))
    assert not dist.is_initialized()


@pytest.mark.parametrize("other", [GridPlan(1, 2, 1, 4), GridPlan(4, 2, 1, 1), GridPlan(2, 1, 2, 2)], ids=str)
def test_groups_of_another_order_are_noticed(other: GridPlan) -> None:
    groups = make_groups(GridPlan(2, 2, 1, 2), RankEnv(5, 8, launched=True), fake=True)
    with pytest.raises(RuntimeError, match=r"megatron's .* group of rank 5 is \[.*\], not the plan's \["):
        check_groups(replace(groups, plan=other))
