"""Ranks of two machines whose YAML, base or text are not the same are refused before anything is spent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_faults import QUIET, ROOT, Ended, finish, mark
from tests.numerics.test_training import write_run
from tests.support.ranks import reserved_port

__all__ = ["mark"]
pytestmark = pytest.mark.usefixtures("forked")


def train_two(mark: str, path: Path, *second: str) -> Ended:
    """`pipeline.train` on two ranks; the second has these settings besides."""
    Path(f"{mark}.txt").unlink(missing_ok=True)
    with reserved_port() as port, open(f"{mark}.txt", "ab") as out:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "pipeline.train", "--config", path]
                + [word for setting in more for word in ("--set", setting)],
                env=os.environ
                | QUIET
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                cwd=ROOT,
                stdout=out,
                stderr=out,
            )
            for rank, more in enumerate(((), second))
        ]
    return finish(mark, ranks)


def test_two_machines_of_two_minds(mark: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, "mark")
    base, text = tmp_path / "copy", tmp_path / "text2"
    shutil.copytree(tmp_path / "base", base)
    shutil.copytree(tmp_path / "text", text)
    # Copies on a machine's own disk are one run, as long as they are copies.
    (text / "2.txt").write_text("w1a w2b " * 2000)
    own = (f"model.path={base}", f"data.path={text}", f"data.cache={tmp_path / 'own'}")
    old = train_two(mark, path, *own)
    assert old.codes == [2, 2] and len(old.told) == 1, old.text
    assert "of one run: what data.path holds (sha256 of its tokens) is " in old.told[0]

    shutil.rmtree(tmp_path / "mark")
    described = (base / "config.json").read_text()
    (base / "config.json").write_text(described.replace("\n", "\n ", 1))
    refused = train_two(mark, path, *own, "train.lr=0.5", "parallel.cp=2", "train.warmup_steps=3")
    assert refused.codes == [2, 2] and len(refused.told) == 1 and "Traceback" not in refused.text, refused.text
    assert "train.lr is 0.005 on rank 0, 0.5 on rank 1" in refused.told[0]
    assert "parallel.cp is 1 on rank 0, 2 on rank 1" in refused.told[0]
    assert "the base's config.json (sha256) is " in refused.told[0]
    assert not [*(tmp_path / "mark").iterdir()], "nothing was tokenized, and the lock was given back"
