"""Processes that tokenize for another one, which may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.tiny_models import write_tokenizer

ROOT = Path(__file__).parents[2]
POOL = """
import sys
from pathlib import Path
from pipeline.data import prepare as module
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import load_tokenizer

def tell(done, *_):
    if done:
        print("at work", flush=True)
        sys.stdin.read()

if __name__ == "__main__":
    module.BATCH_CHARACTERS = 100
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), load_tokenizer(Path(sys.argv[3])), progress=tell, workers=2)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    model, corpus, script = tmp_path / "model", tmp_path / "corpus", tmp_path / "pool.py"
    model.mkdir()
    write_tokenizer(model)
    corpus.mkdir()
    for name in "abc":
        (corpus / f"{name}.txt").write_text("some text of this file")
    script.write_text(POOL)
    child = subprocess.Popen(
        [sys.executable, str(script), str(corpus), str(tmp_path / "out"), str(model)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "at work\n"
        workers = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=20)[1]
