"""What a study's table says of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.study.table import _mean
from tools.study.training import Recorder, training_facts


def test_peak_memory_is_of_training_not_of_the_process_that_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for start, steps, peak, expected in ((0, 2, 5, 5.0), (2, 2, 7, 7.0), (4, 0, 3, 7.0)):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda peak=peak: peak << 30)
        progress = Recorder(4, start)
        progress.losses, progress.seconds = [1.0] * steps, [0.5] * steps
        assert training_facts(4, progress, start, tmp_path)["peak_gib"] == expected


@pytest.mark.parametrize("lost", [float("inf"), float("nan")])
def test_seeds_of_which_one_lost_the_model_are_shown(lost: float) -> None:
    assert _mean([8.0], "{:.4g}".format) == "8"
    assert _mean([8.0, 10.0], "{:.4g}".format) == "9 ± 1.414"
    assert _mean([8.0, lost], "{:.4g}".format) == str(lost)
