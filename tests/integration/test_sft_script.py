"""launch/run_sft_tiny.sh from its first step to its last, on a tiny random model; and its GPU settings, planned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.yaml_file import load_config
from pipeline.data.shards import open_shards
from pipeline.evaluation.answers import AnswersReport
from pipeline.planning.run_plan import plan_run
from tests.integration.test_launchers import launch
from tests.support.tiny_models import make_tiny, write_tokenizer
from tools.support.questions import questions

ROOT = Path(__file__).parents[2]
CHARACTERS_A_TOKEN = 3.7
"""Fewer than SmolLM2's tokenizer takes in of the demo's novels (4.1)."""


def prose(folder: Path, first: int) -> None:
    """Paragraphs of short sentences, no two alike."""
    folder.mkdir(parents=True)
    sentences = [f"Captain number{n} saw the white ship{n} sail home." for n in range(first, first + 120)]
    paragraphs = [" ".join(sentences[at : at + 3]) for at in range(0, len(sentences), 3)]
    (folder / "book.txt").write_text("\n\n".join(paragraphs))


RELAY = """#!/usr/bin/env bash
# Commands of modules are handed to the test, which forks them; others are started.
[[ ${{3:-}} == -m ]] || exec {python} "$@"
place=$(mktemp -d {queue}/XXXXXX)
printf '%s\\0' "$@" > "$place/words"
touch "$place/ready"
until [[ -e $place/code ]]; do sleep 0.02; done
cat "$place/out"
cat "$place/err" >&2
exit "$(< "$place/code")"
"""


def serve(queue: Path, over: threading.Event) -> None:
    """Run what the stand-in for Python asks for, one command after the other."""
    while not over.is_set():
        for ready in queue.glob("*/ready"):
            ready.unlink()
            place = ready.parent
            words = (place / "words").read_text().split("\0")[:-1]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True)
            (place / "out").write_bytes(done.stdout)
            (place / "err").write_bytes(done.stderr)
            (place / "written").write_text(str(done.returncode))
            (place / "written").rename(place / "code")
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_its_six_steps(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    make_tiny(base, "llama2", max_position_embeddings=1024, num_hidden_layers=1)  # untied: a loss near that of a guess
    write_tokenizer(base)  # a token a character
    prose(tmp_path / "text/train", 100)
    prose(tmp_path / "text/val", 500)
    sizes = ["--characters", "400", "--questions", "6", "--held-out", "3"]
    settings = ["--set", "train.steps=2", "--set", "data.sequence=1024", "--set", "model.context=1024"]
    folders = ["--model", str(base), "--text", str(tmp_path / "text"), "--output", str(out)]
    queue, stand_in, over = tmp_path / "queue", tmp_path / "python", threading.Event()
    queue.mkdir()
    stand_in.write_text(RELAY.format(python=sys.executable, queue=queue))
    stand_in.chmod(0o755)
    with ThreadPoolExecutor(1) as pool:
        script = pool.submit(launch, "run_sft_tiny", *folders, *sizes, *settings, LONGSPAN_PYTHON=str(stand_in))
        script.add_done_callback(lambda _: over.set())
        serve(queue, over)
        done = script.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(number) for number in re.findall(r"^== (\d)/6 ", done.stdout, re.MULTILINE)] == [1, 2, 3, 4, 5, 6]

    train, held_out = (open_shards(out / name) for name in ("data", "held_out"))
    assert (train.manifest.documents, held_out.manifest.documents) == (6, 3)
    asked = [json.loads(line)["messages"] for line in (out / "held_out.jsonl").read_text().splitlines()]
    for when in ("before", "after"):
        told = json.loads((out / f"{when}.json").read_text())
        assert [row["right"] for row in told["answers"]] == [answer["content"] for _, answer in asked]
        assert f"{when}: exact match {told['exact']} of 3, the sentence somewhere in the answer {told['held']}" in (
            done.stdout
        )
    found = [AnswersReport.read(out / "run" / f"answers-{label}.json") for label in ("untrained", "after")]
    assert [report.step for report in found] == [0, 2] and {len(report.tokens) for report in found} == {3}
    scored = np.add.reduceat(np.asarray(held_out.scored, int), held_out.starts)
    assert list(found[0].tokens) == scored.tolist()
    page = (out / "run/report/index.html").read_text()
    assert all(f"{report.nll:.4f}" in page for report in found) and "before training" in page
    assert (out / "merged/model.safetensors").is_file() and "verified" in done.stdout.lower()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_its_settings_fit_its_questions(device: str, tmp_path: Path) -> None:
    make_tiny(tmp_path / "base", "smollm2", max_position_embeddings=8192)
    overrides = [f"model.path={tmp_path / 'base'}", f"data.path={tmp_path}", f"eval.path={tmp_path}"]
    config = load_config(ROOT / f"launch/configs/sft_{device}.yaml", overrides)
    plan = plan_run(config, 1)
    assert plan.attention.kind == "full" and config.data.mask_documents and config.eval.path
    script = (ROOT / "launch/run_sft_tiny.sh").read_text()
    lines = [line for line in script.splitlines() if "characters=${characters:-" in line]
    assert len(lines) == 2 and "$device == gpu" in lines[0]
    line = lines[device == "cpu"]
    sizes = {name: int(value) for name, value in re.findall(r"(\w+)=(?:\$\{\w+:-)?(\d+)", line)}
    characters, train, held_out = (sizes[name] for name in ("characters", "train", "held_out"))
    each, answered = sizes["each"], sizes["answered"]
    made = questions(ROOT / "launch/demo/train", train, characters, 0, each)
    held = questions(ROOT / "launch/demo/val", held_out, characters, 0)
    assert len(made) == train and answered <= len(held) == held_out
    longest = 60 + max(len(one.passage + one.question + one.answer) for one in (*made, *held))  # with the template
    assert longest / CHARACTERS_A_TOKEN < config.sequence, "nothing is cut out of a passage"
    # Every question is read about once or twice.
    usual = sum(len(one.passage) for one in made) / train / CHARACTERS_A_TOKEN
    a_window = max(1, int(config.sequence / usual))
    assert 0.8 <= config.train.steps * config.train.global_batch * a_window / train <= 2
