"""`tools.prepare_data --held-out`, killed before each of its renames; run as a program, this is what is killed.

`python -m tests.integration.test_killed_split MOMENT SIGNAL ARGUMENT...` prepares, and sends itself the signal before
the rename of that number.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.shards import open_shards
from tests.support.tiny_models import write_tokenizer
from tools import prepare_data

ROOT = Path(__file__).parents[2]
HALVES = ("train", "validation")
TEMPLATE = "{% for m in messages %}{{ m.content }}|{% endfor %}"


def _main(moment: int, number: int, arguments: list[str]) -> int:
    left, rename = moment, os.rename

    def counted(*given: Any, **more: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), number)
        rename(*given, **more)

    os.rename = counted
    return prepare_data.main(arguments)


def content(out: Path) -> dict[str, dict[str, bytes]]:
    """Of each half that is there, its files; without the picture, which comes last and is no part of it."""
    return {
        half: {file.name: file.read_bytes() for file in (out / half).iterdir() if file.suffix != ".png"}
        for half in HALVES
        if (out / half).exists()
    }


def call_of(place: Path, kind: str) -> list[str]:
    (place / "model").mkdir()
    write_tokenizer(place / "model")
    rows = [{"text": f"text {n}"} if kind == "text" else {"instruction": f"ask {n}", "output": "so"} for n in range(80)]
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "t.jinja").write_text(TEMPLATE)
    chat = ["--chat", "--chat-template", str(place / "t.jinja")] if kind == "chat" else []
    return ["--input", str(place / "a.jsonl"), "--tokenizer", str(place / "model"), *chat]


@pytest.mark.parametrize(("kind", "moments"), [("text", range(9)), ("chat", (0, 5, 8))])
@pytest.mark.usefixtures("forked")
def test_no_signal_at_any_moment_loses_or_mixes_the_halves(
    tmp_path: Path, kind: str, moments: Sequence[int], capfd: pytest.CaptureFixture[str]
) -> None:
    call = call_of(tmp_path, kind)
    pairs = []
    for share in ("0.25", "0.4"):
        assert prepare_data.main([*call, "--held-out", share, "--output", str(tmp_path / share)]) == 0
        pairs.append(content(tmp_path / share))
    old, new = pairs
    assert old.keys() == new.keys() == set(HALVES) and old["train"] != new["train"]
    # Two writers finish; two folders are renamed away, two take their place; two are deleted.
    expected = ["old"] * 3 + ["cut short"] * 3 + ["new"] * 3
    for moment in moments:
        out = tmp_path / f"killed-{moment}"
        shutil.copytree(tmp_path / "0.25", out)
        sent = (signal.SIGTERM, signal.SIGKILL)[moment % 2]
        program = [sys.executable, "-m", "tests.integration.test_killed_split", str(moment), str(int(sent))]
        command = [*program, *call, "--held-out", "0.4", "--output", str(out)]
        ended = subprocess.Popen(command, cwd=ROOT).wait()
        there = content(out)
        assert any(all(there[half] == pair[half] for half in there) for pair in pairs), "never one of each"
        state = "cut short" if len(there) < 2 else "old" if there == old else "new"
        assert (state, ended) == (expected[moment], -sent if moment < 8 else 0)
        # A call that cannot succeed puts back what there was, or leaves what was complete.
        capfd.readouterr()
        assert prepare_data.main([*call, "--held-out", "1e-9", "--output", str(out)]) == 2
        assert capfd.readouterr().err.count("error: ") == 1
        assert content(out) == (new if state == "new" else old)
        assert {path.name for path in out.iterdir()} == {*HALVES, ".train.lock", ".validation.lock"}
        for half in HALVES:
            open_shards(out / half, verify=True)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
