"""An evaluation's grid: whatever ranks are there, each axis a divisor of the training grid's."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.world.grid import check_interleaving, plan_batch, plan_grid
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.grid import fit_ranks

ROOT = Path(__file__).parents[3]
MEGATRON = ["parallel.engine=megatron", "parallel.offload={}"]


@pytest.mark.parametrize(
    ("settings", "world", "expected"),
    [
        ([], 1, (1, 1, 1)),
        ([], 8, (1, 8, 1)),
        (["parallel.cp=2"], 8, (1, 2, 1)),
        ([], 3, (1, 1, 1)),
        ([*MEGATRON, "parallel.tp=8", "parallel.cp=1"], 4, (4, 1, 1)),
        ([*MEGATRON, "parallel.tp=4", "parallel.cp=2", "parallel.pp=2"], 6, (2, 1, 1)),
        ([*MEGATRON, "parallel.tp=2", "parallel.cp=2", "parallel.pp=4", "parallel.virtual=2"], 4, (2, 1, 2)),
        ([*MEGATRON, "parallel.tp=2", "parallel.cp=2", "parallel.pp=4", "parallel.virtual=2"], 1, (1, 1, 1)),
    ],
)
def test_a_grid_that_the_ranks_can_have(settings: list[str], world: int, expected: tuple[int, int, int]) -> None:
    config = load_config(ROOT / "launch/configs/llama2_70b_32k.yaml", settings)
    fitted = fit_ranks(config, world)
    parallel, train = fitted.parallel, fitted.train
    assert (parallel.tp, parallel.cp, parallel.pp) == expected
    grid = plan_grid(world, parallel.tp, parallel.cp, parallel.pp)
    batch = plan_batch(train.global_batch, train.micro_batch, grid.dp)
    check_interleaving(parallel.pp, parallel.virtual, batch.accumulation)
    assert parallel.engine == config.parallel.engine and parallel.offload == config.parallel.offload
    assert fitted.eval == config.eval and fitted.model == config.model
