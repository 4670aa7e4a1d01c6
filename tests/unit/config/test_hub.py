"""Names of the Hub against a cache as huggingface_hub itself lays it out; nothing goes to a network."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.hub import DATASET, MODEL, download_command, local_folder
from pipeline.config.yaml_file import load_config
from pipeline.export.trained_model import find_base
from pipeline.planner.models import find_model
from pipeline.preflight.files import check_model, check_text, check_tokenizer
from pipeline.training.init_from import check_source
from tests.support.tiny_models import make_tiny

BASE = ["--adapter", "adapter"]
COMMIT, OLDER = "c" * 40, "d" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the model org/small (revisions main and v1) and the data set org/books; a folder to stand in."""
    import huggingface_hub.constants

    home = tmp_path / "cache"
    for repo, revisions in (
        ("models--org--small", {"main": COMMIT, "v1": OLDER}),
        ("datasets--org--books", {"main": COMMIT}),
    ):
        for revision, commit in revisions.items():
            (home / repo / "refs").mkdir(parents=True, exist_ok=True)
            (home / repo / "refs" / revision).write_text(commit)
            (home / repo / "snapshots" / commit).mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return home


def test_a_name_is_the_folder_it_was_downloaded_to(cache: Path) -> None:
    snapshots = cache / "models--org--small/snapshots"
    assert local_folder("org/small", MODEL) == local_folder("hf://org/small", MODEL) == str(snapshots / COMMIT)
    assert local_folder("org/small@v1", MODEL) == str(snapshots / OLDER)
    assert local_folder("hf://org/books", DATASET) == str(cache / "datasets--org--books/snapshots" / COMMIT)


def test_files_of_a_data_set_are_named_behind_it(cache: Path) -> None:
    snapshot = cache / "datasets--org--books/snapshots" / COMMIT
    assert local_folder("hf://org/books/data/train-*.parquet", DATASET) == str(snapshot / "data/train-*.parquet")
    assert local_folder("hf://org/books@main/a.txt", DATASET) == str(snapshot / "a.txt")
    with pytest.raises(
        ConfigError, match=r"^hf://org/none: was not downloaded .* hf download org/none --repo-type dataset"
    ):
        local_folder("hf://org/none/data/*", DATASET)


def test_a_folder_comes_before_a_name_of_the_hub(cache: Path) -> None:
    Path("org/small").mkdir(parents=True)
    assert local_folder("org/small", MODEL) == "org/small"
    assert local_folder("hf://org/small", MODEL).startswith(str(cache))
    # What cannot be a name never asks the cache.
    assert [local_folder(text, MODEL) for text in ("/a/b", "./a/b", "a", "a/b/c")] == ["/a/b", "./a/b", "a", "a/b/c"]


def test_what_was_not_downloaded_is_told_with_the_command(cache: Path) -> None:
    assert local_folder("data/books", DATASET) == "data/books", "which may be a folder to come"
    with pytest.raises(ConfigError) as error:
        local_folder("hf://org/other@v2", DATASET)
    command = "hf download org/other --repo-type dataset --revision v2"
    assert str(error.value) == f"hf://org/other@v2: was not downloaded to this machine; run: {command}."
    with pytest.raises(ConfigError, match=r"hf://small: is no name of the Hub; write hf://org/name"):
        local_folder("hf://small", MODEL)
    problem = check_model(Path("org/other"), lambda folder: 0)[0].problem
    assert problem.endswith("(if it is a name of the Hugging Face Hub: hf download org/other).")
    assert "hf download" not in check_model(Path("/models/x/y"), lambda folder: 0)[0].problem


def test_the_command_is_one_that_the_hubs_program_takes() -> None:
    """Its parser, which refuses an option that it does not know before it asks the network."""
    words = download_command("org/other@v2", DATASET).split()
    program = Path(sys.executable).with_name(words[0])
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([program, *words[1:], "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run(
        [program, *words[1:], "--no-such-option", "--help"], env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2


TEXT = ["--text", "text.jsonl", "--output", "out"]
NAMED = {
    "tools.evaluate": [["--model", "org/none", *TEXT], ["--adapter", "org/none", *TEXT], [*BASE, *TEXT]],
    "tools.generate": [[option, "org/none", "--prompt", "x"] for option in ("--model", "--adapter")],
    "tools.merge_lora": [["--adapter", "org/none", "--output", "out"], [*BASE, "--output", "out"]],
    "tools.export_hf": [["--adapter", "org/none", "--output", "out", "--format", "adapter"]],
    "tools.plan": [["--model", "org/none", "--context", "32k"]],
    "tools.answer_questions": [["--model", "org/none", "--questions", "text.jsonl"]],
    "tools.prepare_data": [["--tokenizer", "org/none", "--input", "text.jsonl", "--output", "out"]],
    "tools.import_hf": [["org/none", "out"]],
    "tools.study.__main__": [["--model", "org/none", "--text", "."]],
    "tools.bench.load": [["--model", "org/none"]],
    "tools.bench.data": [["--tokenizer", "org/none"]],
    "tools.preflight": [["--config", "run.yaml", "--set", "model.path=org/none"]],
}
"""Every command that takes a model, an adapter or a tokenizer."""


@pytest.mark.parametrize(("module", "words"), [(name, words) for name, lines in NAMED.items() for words in lines])
def test_every_command_tells_how_to_download(
    cache: Path, module: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("text.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/none"}')
    Path("run.yaml").write_text(
        "model: {path: m, context: 64}\ndata: {path: text.jsonl}\ntrain: {steps: 1, global_batch: 8}\noutput: out\n"
    )
    main = importlib.import_module(module).main
    capsys.readouterr()
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "missing: "))]
    told = [line for line in lines if line.endswith("(if it is a name of the Hugging Face Hub: hf download org/none).")]
    assert len(told) == 1 and "org/none" in told[0].split("(")[0]
    assert told == lines or module == "tools.preflight"


def test_preflight_tells_it_of_texts_and_the_tokenizer(cache: Path) -> None:
    end = "(if it is a name of the Hugging Face Hub: hf download org/none"
    problem = check_text("data.path", Path("org/none"), 8, "text").problem
    assert problem.startswith("data.path: org/none does not exist") and problem.endswith(f"{end} --repo-type dataset).")
    assert check_tokenizer(Path("org/none"), None).problem.endswith(f"{end}).")
    assert end not in check_text("data.path", Path("org/no*ne"), 8, "text").problem
    with pytest.raises(ConfigError, match=r"^init_from: org/none does not exist; .*: hf download org/none\)\.$"):
        check_source("org/none")


def test_a_plan_of_a_downloaded_model_keeps_its_name(cache: Path) -> None:
    make_tiny(cache / "models--org--small/snapshots" / COMMIT, "llama2")
    for text in ("org/small", "hf://org/small"):
        model = find_model(text)
        assert (model.name, model.path, model.arch.layers) == ("small", text, 2)
    Path("org/small").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"org/small/config\.json does not exist"):
        find_model("org/small")


def test_an_adapter_names_its_base_as_the_hub_does(cache: Path) -> None:
    snapshot = cache / "models--org--small/snapshots" / COMMIT
    assert find_base("org/small", None) == snapshot
    assert find_base("org/small", Path("elsewhere").absolute().parent) == Path.cwd(), "--base comes first"
    with pytest.raises(CheckpointError, match=r"--base \(if .*: hf download org/none\)\.$"):
        find_base("org/none", None)


def test_settings_take_names(cache: Path) -> None:
    Path("run.yaml").write_text(
        "model: {path: org/small, context: 64}\ndata: {path: hf://org/books}\n"
        "train: {steps: 1, global_batch: 1}\noutput: org/small\n"
    )
    whole = load_config(Path("run.yaml"), ["data.tokenizer=org/small", "init_from=hf://org/small@v1"])
    assert whole.data.tokenizer == load_config(Path("run.yaml")).model.path and str(whole.init_from).endswith(OLDER)
    config = load_config(Path("run.yaml"))
    assert config.model.path.endswith(COMMIT) and config.data.path.endswith(COMMIT)
    assert config.output == "org/small", "a path that is written is never one of the Hub's"
    with pytest.raises(ConfigError, match=r"^data\.path: hf://org/none: was not downloaded .* \(in run\.yaml"):
        load_config(Path("run.yaml"), ["data.path=hf://org/none"])
