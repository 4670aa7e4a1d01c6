"""The study of recipes: trains what pipeline.train trains, judges with what is measured elsewhere, and goes on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.run import RunConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.judge import Judgement
from pipeline.evaluation.perplexity import EvalReport
from pipeline.evaluation.results import paired_difference
from pipeline.evaluation.tails import tail_nll, tail_spans
from pipeline.train import train
from pipeline.training.trainer import Trainer
from tests.support.places import study_place
from tools.evaluate import main as evaluate
from tools.study.__main__ import main
from tools.study.plan import Places, Recipe, configure, train_key
from tools.study.recipe_file import read_study
from tools.study.run import Outcome
from tools.study.table import markdown

STUDY = """
stretch: 2
seeds: [5]
judge: {lengths: [0.5, 1, 2], retrieval_lengths: [1], tasks: [passkey], windows: 2, trials: 1, tail: 0.5, depths: [0.5]}
common: {attention: {kind: s2, group_fraction: 0.5, full_last_steps: 1}, lora: {rank: 2},
  train: {steps: 2, global_batch: 1, lr: 1.0e-3, warmup_steps: 1}}
recipes:
  - {name: as shipped, untrained: true, stretch: 1, set: {model.rope: {type: none}}}
  - {name: larger base, set: {model.rope: {type: abf, theta: 200000}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = study_place(tmp_path_factory.mktemp("study"), 400, 1200)
    (folder / "study.yaml").write_text(STUDY)
    return folder


def go(place: Path, *more: str, study: str = "study.yaml") -> int:
    arguments = ["--study", str(place / study), "--config", str(place / "run.yaml"), "--model", str(place / "base")]
    return main([*arguments, "--text", str(place / "text"), "--output", str(place / "out"), *more])


def test_a_study_trains_judges_and_is_not_done_twice(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert go(place, "--seconds", "0") == 0
    assert "left early" in capsys.readouterr().out, "no time: told, and no failure"
    assert go(place) == 0
    table = (place / "out" / "study.md").read_text()
    results = {
        data["recipe"]: data
        for data in map(json.loads, (p.read_text() for p in (place / "out/results").glob("*.json")))
    }
    assert set(results) == {"as shipped", "larger base"}
    assert "\npasskey-grass-5 at 400 tokens: the base scores 0 here: nothing to lose or win.\n" in table
    trained, shipped = results["larger base"], results["as shipped"]

    # The weights are those of pipeline.train, to the bit.
    study = read_study(place / "study.yaml")
    runs = place / "out" / "runs"
    places = Places(place / "run.yaml", place / "base", place / "text/train", place / "text/val", runs)
    config = configure(study, study.recipes[1], 5, places, 400)
    assert config.model.context == 800 and config.train.seed == 5 and config.attention.full_last_steps == 1
    alone = as_user(config, place / "alone", lengths=(200, 400, 800), windows=2)
    assert train(alone, RankEnv()) == 0
    (folder,) = (path for path in runs.iterdir() if path.name.startswith("larger-base"))
    mine, theirs = (whole_trained(where / "checkpoints" / "step-000002") for where in (folder, place / "alone"))
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)

    # And so are its perplexities; the base's are those of tools.evaluate on the folder.
    own = EvalReport.from_json(trained["judgement"]["perplexity"])
    report = EvalReport.read(place / "alone" / "eval-after.json")
    assert own.lengths == report.lengths
    arguments = ["--model", str(place / "base"), "--text", str(place / "text/val"), "--output", str(place / "shipped")]
    assert evaluate([*arguments, "--lengths", "200", "400", "800", "--set", "eval.windows=2"]) == 0
    assert evaluate([*arguments, "--lengths", "400", "--tasks", "passkey", "--depths", "1", "--trials", "1"]) == 0
    base = EvalReport.from_json(shipped["judgement"]["perplexity"])
    assert base.lengths == EvalReport.read(place / "shipped" / "eval-shipped.json").lengths
    assert (place / "shipped" / "evaluations.png").read_bytes().startswith(b"\x89PNG")
    cells = shipped["judgement"]["cells"]
    assert cells == json.loads((place / "shipped" / "retrieval-shipped.json").read_text())["cells"]
    assert [(cell["length"], len(cell["scores"])) for cell in cells] == [(400, 1)]

    # The tail of the longest windows is their last blocks, where the model reads whole windows.
    assert trained["judgement"]["tail_context"] == 800 and shipped["judgement"]["tail_context"] == 400
    (longest,) = [result for result in own.lengths if result.length == 800]
    last = [n for n in longest.block_nll[-4:] if n is not None]
    assert sum(trained["judgement"]["tail_nll"]) / 2 == pytest.approx(sum(last) / 4, rel=1e-6)
    assert trained["training"]["tokens"] == 2 * 800 and trained["training"]["seconds"] > 0

    # Done is done; with another setting it is another run.
    def never(*_: object, **__: object) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "run", never)
    assert go(place) == 0
    assert (place / "out" / "study.md").read_text() == table
    assert "2 of 2 runs are there already" in capsys.readouterr().out
    # What an earlier release judged is taken over by its old name, if it was asked the same.
    for path in (place / "out/results").glob("*.json"):
        path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}.json"))
    assert go(place) == 0
    assert "2 of 2 runs are there already" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="trained again"):
        go(place, "--set", "train.lr=2.0e-3")
    with pytest.raises(AssertionError, match="trained again"):
        go(place, "--judge", "windows=1", "--only", "larger base")
    said = capsys.readouterr().out
    assert re.search(r"^larger-base-5-\w{12}\.json stays, and answers other questions than these", said, re.MULTILINE)


def test_a_run_that_diverges_leaves_the_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = "train.lr: 1.0e+30, train.bad_steps: 2, train.steps: 9"
    wild = f"  - {{name: wild, set: {{model.rope: {{type: abf, theta: 200000}}, {train}}}}}\n"
    (place / "wild.yaml").write_text(STUDY.replace("  - {name: larger", wild + "  - {name: larger"))
    for _ in range(2):
        assert go(place, study="wild.yaml") == 0
        page = (place / "out" / "wild.md").read_text()
        assert "| larger base |" in page and "| wild |" not in page
        assert "\nDiverged: wild, seed 5: Training stopped at step" in page
        out = capsys.readouterr().out
    assert "wild, seed 5\n" not in out, "it is not trained again"


def as_user(config: RunConfig, output: Path, lengths: tuple[int, ...], windows: int) -> RunConfig:
    """The same run as a user would write it."""
    evaluation = replace(config.eval, lengths=lengths, windows=windows)
    return replace(config, output=str(output), eval=evaluation)


def test_what_decides_a_run_is_in_its_key(place: Path) -> None:
    study = read_study(place / "study.yaml")
    places = Places(place / "run.yaml", place / "base", place / "text/train", place / "text/val", place / "r")
    recipe = study.recipes[1]

    def key(*more: str, seed: int = 5, base: str = "b", data: str = "d", where: Path = place / "r") -> str:
        changed = Places(*(getattr(places, n) for n in ("run", "model", "train", "held_out")), where, more)
        return train_key(recipe, configure(study, recipe, seed, changed, 400), base, data)

    same = {key(), key(where=place / "elsewhere"), key("save.every=1"), key("eval.windows=9")}
    assert len(same) == 1, "what decides nothing of the weights"
    others = [key("train.lr=0.5"), key("model.rope.theta=3e5"), key("lora.rank=3"), key("attention.full_last_steps=0")]
    others += [key(seed=6), key(base="c"), key(data="e"), key("data.sequence=100")]
    assert len({*same, *others}) == 1 + len(others)
    # Untrained models have no seed and no rates.
    bare = Recipe("bare", recipe.settings, untrained=True)
    keys = {
        train_key(bare, configure(study, bare, seed, places, 400), "b", data) for seed, data in ((5, "d"), (6, "e"))
    }
    assert len(keys) == 1


GOLDEN_KEYS = {
    "bare": "345742105f35e2eb967dca5622dd522854d34e3848ecac40f80141b16f7eddf6",
    "s2": "cf8be6aed8bd70c620b821113da0c24fa82aa2c1ac8c1f1d98bf37fd75fc64d2",
    "whole": "652575a918c0cb82ebfc87c7110661ba0a019d683d8f2b9b040204028827c200",
}
"""As commit 62cedf0 made them, whose results users have. A setting that came later belongs in `plan._LATER`."""


def test_the_shipped_run_is_changed_wherever_one_stands(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--study", str(place / "study.yaml"), "--model", str(place / "base"), "--text", str(place / "text")]
    assert main([*words, "--list"]) == 0, capsys.readouterr().err
    assert "larger base" in capsys.readouterr().out


def test_what_was_trained_before_a_setting_came_is_not_trained_again(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {path: x, context: 8}\ndata: {path: x}\ntrain: {steps: 3, global_batch: 1, without: [kernels]}\n"
        "output: x\n"
    )
    (tmp_path / "study.yaml").write_text(
        "stretch: 2\nseeds: [5]\nrecipes:\n"
        "  - {name: bare, untrained: true, set: {model.rope: {type: abf, theta: 200000}}}\n"
        "  - {name: s2, set: {lora.rank: 2}}\n"
        "  - {name: whole, whole: true, set: {attention.kind: full}}\n"
    )
    study = read_study(tmp_path / "study.yaml")
    places = Places(tmp_path / "run.yaml", *map(Path, ("base", "text", "val", "runs")))

    def keys(*more: str) -> dict[str, str]:
        runs = replace(places, overrides=more)
        return {r.name: train_key(r, configure(study, r, 5, runs, 400), "b", "d") for r in study.recipes}

    assert keys() == GOLDEN_KEYS
    for more in (("model.family=te",), ("model.family=te", "model.fp8_recipe=blockwise")):
        changed = keys(*more, "train.without=[]")
        assert not {*changed.values()} & {*keys("train.without=[]").values()}, more


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("stretch: 2\n", "strech: 2\n"), "strech: unknown key; known here: stretch"),
        (("name: larger base", "name: as shipped"), "two recipes are called 'as shipped'"),
        (("theta: 200000", "theta: -1"), "Recipe 'larger base': model.rope.theta: must be at least 1.0, got -1"),
        (("type: abf, theta: 200000", "type: linear, factor: 1.5"), "1.5 times the original context 400 is 600, less"),
        (("trials: 1", "trials: 0"), "trials: 0 must be at least 1"),
        (("retrieval_lengths: [1]", "retrieval_lengths: [0.1]"), "length 40: the prompt without any filler has"),
        (("tasks: [passkey]", "tasks: [passkeys]"), "'passkeys' is not one of passkey, needle"),
        (("seeds: [5]", "seeds: 5"), "seeds must be a list"),
        (
            ("lengths: [0.5, 1, 2]", "lengths: [0.5, 1, 200]"),
            "fewer than one window of 80000; give more text there, or",
        ),
        (("stretch: 2\n", "stretch: .inf\n"), "wrong.yaml: stretch: inf is no number above 0; give the context over"),
        (("name: larger base,", "name: larger base, stretch: two,"), "recipes[1].stretch: 'two' is no number above 0"),
        (("name: larger base,", "name: larger base, stretch: .inf,"), "recipes[1].stretch: inf is no number above 0"),
        (("name: larger base,", "name: larger base, seconds: .inf,"), "recipes[1].seconds: inf is no time; give"),
        (("name: larger base,", "name: larger base, mix: {code: 2},"), "mix: code: 2 is no share in [0, 1)"),
        (
            ("name: larger base,", "name: larger base, seconds_of: as shipped,"),
            "'as shipped' is no recipe with",
        ),
        (
            ("name: larger base,", "name: larger base, whole: true, seconds_of: b,"),
            "'b' is no recipe with steps",
        ),
        (("name: larger base,", "name: larger base, seconds: 0,"), "recipes[1].seconds: 0 is no time; give seconds of"),
        (("name: larger base,", "name: larger base, seconds: ten,"), "recipes[1].seconds: 'ten' is no time"),
        (("name: larger base,", "name: larger base, seconds: 9, seconds_of: x,"), "are two budgets; remove one"),
        (("shipped, untrained: true", "shipped, untrained: true, seconds: 9"), "is untrained and takes no time"),
        (("shipped, untrained: true", "shipped, untrained: true, whole: true"), "is untrained, so whole and mix"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_is_trained(
    place: Path, change: tuple[str, str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.study.run.Workshop.run", lambda *_: pytest.fail("it was begun"))
    assert change[0] in STUDY
    (place / "wrong.yaml").write_text(STUDY.replace(*change))
    assert go(place, study="wrong.yaml") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in line


def test_a_missing_study_is_one_sentence(place: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: cannot be read .*give the path"):
        read_study(place / "none.yaml")


def test_tails_see_what_they_may() -> None:
    """Each of the last tokens is scored once, with as much context as is allowed."""

    def position_nll(tokens_BS: torch.Tensor) -> torch.Tensor:
        return torch.arange(1, tokens_BS.shape[1], dtype=torch.float32).expand(len(tokens_BS), -1)

    windows = torch.arange(60).view(2, 30)
    # 8 tokens in steps of 3, 3, 2; windows of 10: contexts 7 8 9, 7 8 9, 8 9.
    assert tail_spans(30, 8, 10, 3) == [(15, 25), (18, 28), (20, 30)]
    assert tail_nll(position_nll, windows, 8, 10, 3) == [pytest.approx((24 + 24 + 17) / 8)] * 2
    assert tail_nll(position_nll, windows, 8, 99, 8) == [pytest.approx(sum(range(22, 30)) / 8)] * 2
    with pytest.raises(ValueError, match="do not fit"):
        tail_spans(30, 8, 3, 3)


def test_differences_are_paired() -> None:
    mean, error = paired_difference([3.0, 5.0, 10.0], [2.0, 4.5, 9.0])
    assert mean == pytest.approx(2.5 / 3)
    assert error == pytest.approx(math.sqrt(((1 / 6) ** 2 * 2 + (1 / 3) ** 2) / 2 / 3))
    assert paired_difference([1.0], [3.0]) == (-2.0, None)


WHOLE = """
stretch: 2
seeds: [5]
judge: {lengths: [0.5, 2], retrieval_lengths: [1], tasks: [passkey], windows: 1, trials: 1, tail: 0.5, depths: [0.5]}
common: {attention: {kind: full}, lora: {rank: 2}, train: {steps: 1, global_batch: 2, lr: 1.0e-3, warmup_steps: 1},
  model.rope: {type: abf, theta: 200000}}
recipes:
  - {name: adapters}
  - {name: mixed, mix: {code: 0.5, notes: 400}}
  - {name: whole, whole: true}
  - {name: whole in time, whole: true, seconds_of: adapters, set: {train.steps: 1000}}
"""


def test_full_fine_tuning_reads_the_same_windows_and_is_judged_alike(place: Path) -> None:
    (place / "whole.yaml").write_text(WHOLE)
    assert go(place, study="whole.yaml") == 0
    results = {
        data["recipe"]: data
        for data in map(json.loads, (p.read_text() for p in (place / "out/results").glob("*.json")))
    }
    adapters, whole, in_time = (results[name]["training"] for name in ("adapters", "whole", "whole in time"))
    # Step 1 is that of the same model on the same two windows; on other text it is another.
    assert whole["loss"] == pytest.approx(adapters["loss"], rel=1e-5)
    assert results["mixed"]["training"]["loss"] != pytest.approx(adapters["loss"], rel=1e-3)
    assert whole["tokens"] == adapters["tokens"] == 1600
    (mixed,) = (path for path in place.rglob("mixed/code-0.5-*") if path.is_dir())
    assert mixed.with_name(f"{mixed.name}.json").is_file(), "a mark of each mixture's own, whatever its shares"
    # The budget is the other's steps at the pace it was timed at, and the steps are as many as fit into it.
    budget = in_time["budget"]
    assert in_time["steps"] == max(1, round(budget["seconds"] / budget["step_seconds"])) < 1000
    assert in_time["tokens"] == in_time["steps"] * 1600 and budget["device"] == "CPU"
    assert results["whole in time"]["config"]["train"]["steps"] == in_time["steps"], "it can be repeated"

    # The judge's figures are transformers' own of the model that was saved.
    (folder,) = (path for path in (place / "out/runs").iterdir() if path.name.startswith("whole-5-"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.max_position_embeddings == 800
    tokenizer = load_tokenizer(place / "base")
    text = torch.tensor(tokenizer.encode((place / "text/val/a.txt").read_text())[:800])
    with torch.no_grad():
        loss = model(input_ids=text[None], labels=text[None]).loss
    longest = results["whole"]["judgement"]["perplexity"]["lengths"][-1]
    assert longest["length"] == 800 and longest["nll"] == pytest.approx(float(loss), rel=1e-4)


def test_a_table_of_several_seeds_shows_their_spread(place: Path) -> None:
    """Means and sample deviations over seeds, of figures each seed's own run has."""
    (place / "whole.yaml").write_text(WHOLE)
    (place / "base.yaml").write_text(STUDY)
    assert go(place, study="base.yaml") == 0 and go(place, "--only", "adapters", study="whole.yaml") == 0
    results = [json.loads(path.read_text()) for path in (place / "out/results").glob("*.json")]
    base, run = (next(r for r in results if r["recipe"] == name) for name in ("as shipped", "adapters"))
    recipe = Recipe("adapters")
    judged = [Judgement.from_json(run["judgement"]) for _ in range(2)]
    # A second seed that is 0.1 nats worse everywhere, and finds what the first does not.
    worse = [replace(r, window_nll=tuple(n + 0.1 for n in r.window_nll)) for r in judged[1].perplexity.lengths]
    cells = tuple(replace(cell, scores=(1.0,)) for cell in judged[1].cells)
    other = replace(judged[1], perplexity=replace(judged[1].perplexity, lengths=tuple(worse)), cells=cells)
    own = Judgement.from_json(base["judgement"])
    own = replace(own, perplexity=judged[0].perplexity, tail_nll=())
    shipped = Outcome(Recipe("as shipped", untrained=True), 5, own, {})
    runs = [Outcome(recipe, 5, judged[0], run["training"]), Outcome(recipe, 6, other, run["training"])]
    row = markdown([shipped, *runs], shipped).splitlines()[3]
    ratio = 100 * (math.exp(0.1) - 1)
    assert row.startswith("| adapters | 2 |")
    assert f"| {ratio / 2:.1f} ± {ratio / math.sqrt(2):.1f}% |" in row, "0 and exp(0.1)"
    assert "| 50% ± 71% (0%) |" in row
