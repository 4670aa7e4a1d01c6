"""A run on a mixture: shown and recorded, and resumed on another grid at the very next windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.data.tokenizer import load_tokenizer
from pipeline.train import main
from tests.numerics.test_training import write_run
from tests.support.ranks import run_ranks
from tests.support.runs import build_run


def next_windows(_: int, __: int, path: str, setting: str) -> tuple[int, list[list[int]]]:
    """Step that a resumed run begins with, and this rank's windows of it, by their first tokens."""
    env = RankEnv.read()
    run = build_run(load_config(Path(path), [setting]), env)
    try:
        step = run.trainer.step
        return step, [row[:24].tolist() for batch in run.trainer.parts.loader.step(step) for row in batch.tokens]
    finally:
        run.trainer.parts.saver.close()
        run.trainer.parts.loader.close()
        destroy_groups(keep_world=env.launched)


def test_a_mixture_is_trained_shown_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    for name, word in (("digits", "7"), ("letters", "z")):
        (tmp_path / f"{name}.txt").write_text(f"{word} {name} " * 900)
    sources = f"[{{path: {tmp_path}/dig*.txt, weight: 3}}, {{path: {tmp_path}/letters.txt, weight: 1}}]"
    setting = f"data.path={sources}"
    assert main(["--config", str(path), "--set", setting, "--stop-after", "2"]) == 0
    told = capsys.readouterr().out
    assert f"data.path[0]: {tmp_path}/dig*.txt matches 1 file: digits.txt." in told
    for name, share in (("dig*", "75.0%"), ("letters", "25.0%")):
        assert f"{share} from {tmp_path}/{name}.txt: 1 document, " in told
    rows: list[dict[str, Any]] = json.loads((run / "run.json").read_text())["sources"]
    assert [(row["share"], row["documents"], row["chat"]) for row in rows] == [(0.75, 1, False), (0.25, 1, False)]
    assert rows[0]["tokens"] == len("7 digits " * 900) + 1, "a token a letter, and EOS"
    config = load_config(path, [setting])
    drawn = config.train.steps * config.train.global_batch
    assert rows[1]["times_read"] == pytest.approx(drawn / 4 / rows[1]["windows"])
    assert f"| {tmp_path}/letters.txt | 1 document |" in (run / "mixture.md").read_text()

    step, alone = next_windows(0, 1, str(path), setting)
    assert step == 2 and len(alone) == config.train.global_batch == 4
    tokenizer = load_tokenizer(tmp_path / "base")
    digit, letter = (sum(tokenizer.encode(mark)[0] in row for row in alone) for mark in "7z")
    assert (digit, letter) == (3, 1), "a step of four has the weights' shares"
    halves = run_ranks(next_windows, 2, str(path), setting)
    assert [begun for begun, _ in halves] == [2, 2] and halves[0][1] + halves[1][1] == alone

    other = setting.replace("weight: 1", "weight: 2")
    assert main(["--config", str(path), "--set", other]) == 2
    assert "the training data is not the one the checkpoint was trained on" in capsys.readouterr().err
    empty = tmp_path / "short.txt"
    empty.write_text("no window")
    short = f"data.path=[{{path: {tmp_path}/digits.txt}}, {{path: {empty}}}]"
    assert main(["--config", str(path), "--set", short, "--set", f"output={tmp_path}/other"]) == 2
    assert "holds 10 tokens, but one window of 64 needs 65" in capsys.readouterr().err
    none = f"data.path=[{{path: {tmp_path}/digits.txt}}, {{path: '{tmp_path}/[xy]*.txt'}}]"
    assert main(["--config", str(path), "--set", none, "--set", f"output={tmp_path}/other"]) == 2
    assert f"{tmp_path}/[xy]*.txt: matches no file; mend the pattern" in capsys.readouterr().err
    gone = f"data.path=[{{path: {tmp_path}/digits.txt}}, {{path: {tmp_path}/gone}}]"
    assert main(["--config", str(path), "--set", gone]) == 2
    assert f"data.path[1]: {tmp_path}/gone does not exist" in capsys.readouterr().err
