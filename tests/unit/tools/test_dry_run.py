"""Dry runs where nothing can be measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

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
