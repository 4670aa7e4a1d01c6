"""What stands in for the other ranks' data under a fake process group, and what of the memory it takes is not real."""

from __future__ import annotations

import pytest
import torch

from parallel import fake
from parallel.groups import make_groups
from parallel.plan import plan_grid
from parallel.rank_env import RankEnv
from tests.single import single_groups


def test_a_gather_has_memory_of_its_own_and_numbers_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "_numbers", {})
    group = make_groups(plan_grid(4, 4, 1, 1), RankEnv(1, 4, launched=True), fake=True).collection.tp
    assert fake.numbers_bytes() == 0
    small, large = (fake.gathered_from(torch.ones(rows, 3), group) for rows in (2, 5))
    assert small.shape == (8, 3) and large.shape == (20, 3)
    assert large.isfinite().all() and 0.01 < float(large.std()) < 0.03, "no power is saved on zeros"
    # A real gather's memory, besides the numbers: both may be alive at once.
    own = [view.buffer for view in (small, large)]  # type: ignore[attr-defined]
    assert [buffer.shape for buffer in own] == [small.shape, large.shape]
    assert own[0].data_ptr() != own[1].data_ptr()
    again = fake.gathered_from(torch.zeros(5, 3), group)
    assert again.data_ptr() == large.data_ptr() and fake.numbers_bytes() == large.nbytes
    fake.gathered_from(torch.zeros(5, 3, dtype=torch.bfloat16), group)
    assert fake.numbers_bytes() == large.nbytes + large.nbytes // 2


def test_a_real_gather_gets_a_plain_buffer() -> None:
    before = fake.numbers_bytes()
    whole = fake.gathered_from(torch.ones(2, 3), single_groups().collection.tp)
    assert whole.shape == (2, 3) and not hasattr(whole, "buffer") and fake.numbers_bytes() == before
