"""`tools.bench.survive`: a rank killed mid-step and mid-save, half the ranks go on; and what it would not accept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tools.bench import survive

pytestmark = pytest.mark.usefixtures("forked")
TINY = ["--cpu", "--hidden", "64", "--layers", "2", "--sequence", "64", "--vocab", "128"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_continue_on_half_the_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "cases.json"
    code = survive.main(["--processes", "2", *TINY, "--output", str(tmp_path / "out"), "--json", str(told)])
    shown = capsys.readouterr()
    assert code == 0, shown
    step, save = (json.loads(line) for line in told.read_text().splitlines())
    assert (step["name"], save["name"]) == ("mid-step", "mid-save") and "mid-save" in shown.out
    for case in (step, save):
        assert case["rank"] == 1 and case["ranks"] == 1 and case["code"] and not case["problems"]
        assert 0 < case["resumed"] < case["at_step"] + 1 and case["seconds"] < survive.END_S
        assert 0 <= case["worst"] <= case["limit"] == 1e-5
    assert save["left"].startswith(f"step-{save['at_step']:06d}: ") and save["resumed"] < save["at_step"]


def test_what_it_would_not_accept(tmp_path: Path) -> None:
    bench = survive.Bench(survive.parse(["--processes", "2", *TINY, "--output", "x", "--steps", "4"]), tmp_path)
    assert bench.halved == ("parallel.cp=1",)
    bench.losses = {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}

    def problems(*losses: float) -> tuple[float, list[str]]:
        folder, found = tmp_path / "run", list[str]()
        folder.mkdir(exist_ok=True)
        rows = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(losses, start=1)]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        return bench.compare("run", 2, found), found

    assert problems(5.0, 4.0, 3.0, 2.0) == (0.0, [])
    assert problems(9.0, 9.0, 3.0, 2.00001)[1] == [], "steps before the resume are another job's"
    worst, found = problems(5.0, 4.0, 5.0, 4.0)
    assert worst == 1.0 and found == ["a loss differs by more than 1e-05"]
    worst, found = problems(5.0, 4.0, 3.0)
    assert math.isnan(worst) and found[0].startswith("steps [1, 2, 3] were recorded")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--processes", "3"], "cannot be halved"),
        (["--processes", "4", "--cp", "3"], "does not divide 4"),
        (["--processes", "2", "--hidden", "72"], "not a multiple of 16"),
        (["--processes", "6", "--cp", "3", "--tp", "1"], None),
    ],
)
def test_arguments(words: list[str], text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*TINY, *words, "--output", str(tmp_path / "out")]
    if text is None:
        assert survive.plan(survive.parse(args), tmp_path)[1] == (), "dp 2 is halved"
        return
    assert survive.main(args) == 2
    assert text in capsys.readouterr().err
