"""The shipped plans: every recipe of each trains and is judged on a tiny model, once, and says what it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import ConfigError
from tests.support.places import study_place
from tools.study.__main__ import main
from tools.study.plan import Places, Recipe, configure
from tools.study.recipe_file import PLANS, plan_file, read_study

TABLES = ("table1", "table2", "table6", "groups")
SHRUNK = ["--set", "train.steps=2", "--set", "train.warmup_steps=1", "--seeds", "5"]
JUDGED = ["--judge", "windows=1", "trials=1", "depths=[0.5]", "retrieval_lengths=[1]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_place(tmp_path_factory.mktemp("plans"), 400, 2500, layers=2)


def go(place: Path, plan: str, *more: str) -> int:
    arguments = ["--plan", plan, "--config", str(place / "run.yaml"), "--model", str(place / "base")]
    arguments += ["--text", str(place / "text"), "--output", str(place / "out"), *SHRUNK, *more]
    return main(arguments)


def losses(place: Path, steps: int) -> dict[str, float]:
    """Loss of the last step by recipe, over all plans, of runs of so many steps."""
    results = map(json.loads, (path.read_text() for path in (place / "out/results").glob("*.json")))
    trained = [data for data in results if data["training"].get("steps") == steps]
    return {data["recipe"]: data["training"]["loss"] for data in trained}


@pytest.mark.parametrize("plan", TABLES)
def test_a_plan_runs_whole(plan: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [recipe.name for recipe in read_study(plan_file(plan)).recipes]
    assert go(place, plan, *JUDGED) == 0
    out = capsys.readouterr().out
    for name in names:
        assert f"| {name} | 1 |" in out
    (table,) = (place / "out").glob(f"{plan}-*.json")  # asked other lengths than the plan's own
    kept = json.loads(table.read_text())
    assert [run["recipe"] for run in kept["runs"]] == names and kept["base"] == "as shipped"
    assert all(run["training"].get("steps", 2) == 2 for run in kept["runs"])
    assert all(list(run["retrieval"]) == ["passkey-grass-5"] for run in kept["runs"])
    # What another plan trained already is not trained again under another name; the same command trains nothing.
    assert go(place, plan, *JUDGED) == 0
    assert f"{len(names)} of {len(names)} runs are there already" in capsys.readouterr().out


def test_full_fine_tuning_has_the_attention_it_says(place: Path) -> None:
    """Before the first update adapters change nothing: the loss of the one step is that of the product's own."""
    tuned = ["full fine-tuning, S2, PI", "full fine-tuning, full attention, PI", "LoRA r 64, PI"]
    patterns = ["S2, across layers", "unshifted only", "shifted only", "dilated by 2", "strided"]
    trained = ["S2, across heads, PI", "full attention, PI", *(f"{name}, PI" for name in patterns)]
    for plan, names in (("table2", tuned), ("table6", trained)):
        assert go(place, plan, *JUDGED, "--set", "train.steps=1", "--only", *names) == 0
    found = losses(place, steps=1)
    ours, full = found["S2, across heads, PI"], found["full attention, PI"]
    assert found["full fine-tuning, S2, PI"] == pytest.approx(ours, rel=1e-5)
    assert found["LoRA r 64, PI"] == pytest.approx(ours, rel=1e-5)
    assert found["full fine-tuning, full attention, PI"] == pytest.approx(full, rel=1e-5)
    several = [full, ours, *(found[f"{name}, PI"] for name in patterns)]
    assert all(abs(a - b) > 1e-5 for n, a in enumerate(several) for b in several[:n]), "each sees other tokens"


def settings(plan: str) -> dict[str, Any]:
    """What the runs of a plan are, by recipe, for SmolLM2's 8192 tokens."""
    places = Places(Path("launch/configs/tiny_gpu.yaml"), Path("base"), Path("t"), Path("v"), Path("r"))
    study = read_study(plan_file(plan))
    return {recipe.name: configure(study, recipe, 5, places, 8192) for recipe in study.recipes}


def test_the_plans_are_the_papers_tables() -> None:
    """Against what tables 1, 2 and 6 of arXiv 2309.12307 vary."""
    table1, table2, table6, groups = map(settings, TABLES)
    kinds = {(c.model.context, c.attention.kind, c.attention.shifted_heads) for c in table1.values()}
    rows = [("full", "upper_half"), ("s2", "upper_half"), ("s2", "none")]
    assert kinds >= {(context, *row) for context in (16384, 32768) for row in rows}
    trained = {(c.lora.rank, c.lora.scale, c.train.trainable) for name, c in table2.items() if name.startswith("LoRA")}
    assert trained == {
        *((rank, 2.0, ("lora",)) for rank in (8, 16, 64)),
        *((8, 2.0, ("lora", *more)) for more in (("norm",), ("embed",), ("embed", "norm"))),
    }
    assert {c.attention.kind for name, c in table2.items() if name.startswith("full fine-tuning, S2")} == {"s2"}
    assert {c.model.rope.type for name, c in table2.items() if name != "as shipped"} == {"linear", "abf"}
    patterns = {(c.attention.kind, c.attention.shifted_heads, c.attention.dilation) for c in table6.values()}
    assert patterns >= {("s2", rule, 1) for rule in ("upper_half", "odd_layers", "none", "all")}
    assert patterns >= {("full", "upper_half", 1), ("s2", "upper_half", 2), ("s2", "upper_half", 4)}
    # Strided over the whole sequence: every fourth of 16384 tokens is as much as a group.
    assert all(4 * c.group == c.sequence == 16384 for name, c in table6.items() if name.startswith("strided"))
    assert {c.group for c in groups.values()} >= {32768 // n for n in (2, 4, 8, 16)}
    assert any(c.attention.legacy_wrap for c in groups.values())
    for plan in (table1, table2, table6, groups):
        assert len({(c.train.steps, c.train.lr_embed_norm) for c in plan.values()}) == 1, "equal steps"


def test_what_a_plan_reads_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--plan", "table6", "--model", str(place / "base"), "--text", "t", "--seeds", "1", "2", "2", "--list"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    # 400 tokens of its own, 6 windows of 1/4, 1 and 2 of them, 20 prompts of 1/4, 1/2, 1 and 2; 100 steps of 800.
    judged = 400 * (6 * 3.25 + 20 * 3.75) / 1e6
    assert lines[0] == f"  1  as shipped, seed 1: is not trained, is judged on {judged:.2f}M"
    assert lines[1] == f"  2  full attention, PI, seed 1: trains 0.08M tokens, is judged on {judged:.2f}M"
    assert len(lines) == 1 + 2 * 14 + 1
    assert lines[-1].startswith(f"all: {2 * 14 * 0.08:.1f}M tokens trained, {29 * judged:.1f}M read to judge")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--plan", "table3"], "--plan: 'table3' is not one of bases, fixed, groups, recipes, table1, table2, table6;"),
        (["--judge", "trial=1"], "--judge: 'trial=1' sets nothing; give key=value of lengths,"),
        (["--judge", "trials"], "--judge: 'trials' sets nothing"),
        (["--judge", "trials=many"], "judge.trials: 'many' is not a whole number."),
        (["--judge", "depths=0.5"], "judge.depths: 0.5 is not a list, each a number."),
        (["--judge", "lengths=[]"], "judge: lengths, retrieval_lengths and ruler_lengths must name at least one"),
        (["--judge", "windows=0"], "judge.windows: must be at least 1, got 0."),
        (["--judge", "lengths=[1, 0]"], "judge.lengths: [1, 0] are not all lengths; give numbers above 0."),
        (["--judge", "lengths=[.inf]"], "judge.lengths: [inf] are not all lengths; give numbers above 0."),
        (["--judge", "tail=9"], "judge.tail: must be from 0 to below the longest of judge.lengths, got 9."),
        (["--judge", "tail=-1"], "judge.tail: must be from 0 to below the longest of judge.lengths, got -1."),
        (["--only", "S3"], "--only: no recipe is called 'S3'; there are: as shipped;"),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(place, "table1", *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in line


def test_variants_are_written_out(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    head = "stretch: 2\nvariants: [{name: x, set: {train.lr: 1.0}}, {name: y, set: {train.lr: 2.0}}]\n"
    file.write_text(
        head + "recipes: [{name: b, untrained: true}, {name: a}, {name: w, whole: true, set: {train.lr: 3.0}}]\n"
    )
    expected = [("b", ()), ("a, x", (1.0,)), ("w, x", (1.0, 3.0)), ("a, y", (2.0,)), ("w, y", (2.0, 3.0))]
    assert [(r.name, tuple(v for _, v in r.settings)) for r in read_study(file).recipes] == expected
    assert isinstance(read_study(file).recipes[0], Recipe)
    file.write_text("stretch: 2\nvariants: [{name: x}]\nrecipes: [{name: a}]\n")
    with pytest.raises(ConfigError, match=r"variants\[0\].set: is missing"):
        read_study(file)


def test_every_plan_is_shipped() -> None:
    assert {path.stem for path in PLANS.glob("*.yaml")} == {*TABLES, "bases", "fixed", "recipes"}
