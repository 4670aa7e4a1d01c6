"""A model that is loaded to be evaluated leaves nothing behind, however the evaluation ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.states import load_state_of
from tests.support.places import run_place

RUN = """
model: {{path: {0}/base, context: 128}}
data: {{path: {0}/train}}
train: {{steps: 1, global_batch: 1}}
eval: {{path: {0}/val, lengths: [96], prefill: 32}}
output: {0}/run
"""


@pytest.mark.parametrize("fails", [False, True])
def test_its_host_memory_is_given_back(tmp_path: Path, fails: bool) -> None:
    """Keys and values of an evaluation in chunks, and on a GPU weights: page-locked memory that nobody unlocks."""
    place = run_place(tmp_path, 128, 400, RUN)
    kept = []

    def measure() -> None:
        with load_state_of(load_config(place / "run.yaml"), RankEnv(), "shipped") as loaded:
            kept.append(loaded.model._cache._layers)
            loaded.model.token_nll(torch.arange(3, 99)[None], loaded.plan.full_attention)
            assert kept[0], "chunks were kept"
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            measure()
    else:
        measure()
    assert not kept[0]
