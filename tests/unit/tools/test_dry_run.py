"""Dry runs where nothing can be measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny
from tools.dry_run import main

CONFIG = Path(__file__).parents[3] / "launch/configs/llama2_70b_32k.yaml"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_the_formula_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    """70B on a CPU would take this machine's memory: one sentence with the estimate, before anything is allocated."""
    assert main(["--config", str(CONFIG), "--set", "parallel.cp=2", "--set", "train.recompute=full"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    found = re.search(r"^error: PyTorch sees no GPU .* about ([\d.]+) GiB of its GPU and ([\d.]+) GiB of host", said)
    # docs/RESULTS.md: 26.9 GiB of the GPU were measured, and 16 GiB are pinned in host memory.
    assert found is not None and 26 < float(found[1]) < 34 and 16 < float(found[2]) < 24, said


def _dry(rank: int, world: int, config: str, figures: str) -> int:
    return main(["--config", config, "--steps", "1", "--json", figures])


def test_under_a_launcher_all_ranks_share_the_stand_ins(tmp_path: Path) -> None:
    """Their settings are compared at the meeting: a folder of each rank's own would be another run."""
    base = make_tiny(tmp_path / "base", "llama2")
    for weights in base.glob("*.safetensors"):
        weights.unlink()
    config, figures = tmp_path / "run.yaml", tmp_path / "figures.json"
    config.write_text(
        f"model: {{path: {base}, context: 256, dtype: fp32, rope: {{type: linear}}}}\ndata: {{path: {tmp_path}/none}}\n"
        "train: {steps: 4, global_batch: 2}\nparallel: {cp: 2}\noutput: runs/x\n"
    )
    assert run_ranks(_dry, 2, str(config), str(figures), timeout=120) == [0, 0]
    (found,) = map(json.loads, figures.read_text().splitlines())
    assert found["seconds a step"] > 0 and found["title"].endswith("cp 2, CPU, all there")


@pytest.mark.parametrize("given", ["--steps 0", "--nproc 0", "--rank -1", "--nproc 2 --rank 2"])
def test_a_step_and_a_rank_there_must_be(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by reading: no step was the median of nothing, and a rank beyond the last a coordinate off the grid."""
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(CONFIG), *given.split()])
    assert f"error: {given.split()[-2]}: " in capsys.readouterr().err
