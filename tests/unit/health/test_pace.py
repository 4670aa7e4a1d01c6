"""Which rank is slow: by the sentence's definition, over real processes, and a product that really takes longer."""

from __future__ import annotations

import time

import pytest
import torch

from parallel.health import pace
from parallel.health.pace import named_slow, slow_ranks
from parallel.world.grid import plan_grid
from parallel.world.groups import make_groups
from parallel.world.rank_env import RankEnv
from tests.support.ranks import run_ranks


def test_the_slow_are_named_and_what_differs_by_chance_is_not() -> None:
    hosts = ["a", "a", "b", "b"]
    assert named_slow([1.0, 1.01, 0.98, 1.1], hosts) == []
    (said,) = named_slow([1.0, 1.01, 1.3, 0.99], hosts)
    assert said.startswith("rank 2 on b: ") and "1.30 times" in said
    assert len(named_slow([1.0, 1.0, 1.0, 2.0], hosts)) == 1
    # Of two ranks nobody knows which is as it should be: the faster one.
    assert len(named_slow([1.0, 2.0], ["a", "b"])) == 1
    assert named_slow([1.0], ["a"]) == []


def looks(rank: int, world: int) -> list[str]:
    groups = make_groups(plan_grid(world, 1, 1, 1), RankEnv.read())
    return slow_ranks(groups, own=2.0e-3 if rank == 1 else 1.0e-3)


def test_every_rank_hears_of_the_slow_one() -> None:
    found = run_ranks(looks, 3)
    assert found[0] == found[1] == found[2]
    (said,) = found[0]
    assert said.startswith("rank 1 on ") and "2.00 times" in said


def test_a_slower_product_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    before, mm = pace.pace(torch.device("cpu")), torch.mm

    def slowed(*args: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return mm(*args, out=out)

    monkeypatch.setattr(torch, "mm", slowed)
    assert pace.pace(torch.device("cpu")) >= max(0.05, before)


@pytest.mark.gpu
def test_a_gpus_pace_is_its_products() -> None:
    """A product of 4096 is 0.14 TFLOP: no GPU this is for takes 10 ms, none makes more than 3 PFLOP/s."""
    assert 4e-5 < pace.pace(torch.device("cuda")) < 1e-2
