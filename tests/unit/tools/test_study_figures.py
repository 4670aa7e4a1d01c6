"""What a study's table says of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tools.study.plots import drawn
from tools.study.table import _mean
from tools.study.training import Recorder, training_facts
from tools.support.report_plots import to_png


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


def _run(recipe: str, seed: int, perplexity: dict[str, float | None], exact: dict[str, float]) -> dict[str, Any]:
    retrieval = {"passkey": {length: {"exact": score, "first token given": 1.0} for length, score in exact.items()}}
    return {"recipe": recipe, "seed": seed, "perplexity": perplexity, "retrieval": retrieval}


def test_the_picture_has_the_means_of_all_seeds() -> None:
    found = {
        "base": "shipped",
        "runs": [
            _run("shipped", 0, {"1024": 10.0, "4096": 5000.0}, {"1024": 1.0}),
            _run("ours", 0, {"1024": 8.0, "4096": 9.0}, {"1024": 0.5, "4096": 0.2}),
            _run("ours", 1, {"1024": 9.0, "4096": None}, {"1024": 1.0, "4096": 0.4}),
        ],
    }
    read, found_again = drawn(found).axes
    lines = [container.lines[0] for container in read.containers]  # type: ignore[attr-defined]
    assert [list(line.get_ydata()) for line in lines] == [[10.0, 5000.0], [8.5, 9.0]]
    assert read.get_ylim()[1] < 20, "a lost model stretches no axis"
    lines = [container.lines[0] for container in found_again.containers]  # type: ignore[attr-defined]
    assert [list(line.get_xdata()) for line in lines] == [[1024], [1024, 4096]]
    assert list(lines[1].get_ydata()) == pytest.approx([75.0, 30.0])


def test_a_picture_of_nothing_that_is_finite() -> None:
    found = {"base": None, "runs": [_run("lost", 0, {"1024": None}, {})]}
    assert to_png(drawn(found)).startswith(b"\x89PNG")
