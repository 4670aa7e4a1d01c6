"""Every command of tools/bench/record.sh can run: a GPU machine is no place to find out that one cannot."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tools.bench import step

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools/bench/record.sh"
LABELS = re.findall(r"^  ([a-z0-9-]+(?: \| [a-z0-9-]+)*)\)$", SCRIPT.read_text(), re.MULTILINE)
PARTS = [part for label in LABELS for part in label.split(" | ")]
STANDS_IN = {
    "python3": 'printf "%q " "$@" >> "$LINES"; echo >> "$LINES"',
    "nvidia-smi": 'for number in $(seq "$GPUS"); do echo "GPU $number"; done',
    "tar": "true",
}


def commands(part: str, gpus: int, scratch: Path) -> list[list[str]]:
    """Words of every call of Python that a part makes on a machine of so many GPUs."""
    programs, lines = scratch / "bin", scratch / "lines"
    programs.mkdir()
    for name, does in STANDS_IN.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (programs / name).chmod(0o755)
    lines.touch()
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "LINES": str(lines), "GPUS": str(gpus)}
    done = subprocess.run(["bash", SCRIPT, part, scratch / "out"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in lines.read_text().splitlines()]


def machines(part: str) -> tuple[int, ...]:
    """GPUs of the hosts that a part is for."""
    return (4, 8) if part.startswith("node") else (2, 4, 8) if part.startswith("survive") else (2,)


@pytest.mark.parametrize(("part", "gpus"), [(part, gpus) for part in PARTS for gpus in machines(part)])
def test_every_command_is_one(part: str, gpus: int, tmp_path: Path) -> None:
    found = commands(part, gpus, tmp_path)
    assert found, f"{part} runs nothing"
    for words in found:
        modules = [word for before, word in zip(words, words[1:], strict=False) if before == "-m"]
        modules = [word for word in modules if word not in ("gpu", "torch.distributed.run")]
        assert importlib.util.find_spec(modules[0]), words
        if modules[0] != "tools.bench.step":
            continue
        launched = "--nproc-per-node" in words
        _, args = step.parse(words[words.index("tools.bench.step") + 1 :])
        world = int(words[words.index("--nproc-per-node") + 1]) if launched else args.tp * args.cp
        for variant in step.variants_of(args):
            plan = step.plan_of(args, variant, world)
            if args.cap_gib and plan.config.train.recompute == "auto":
                assert plan.memory().gpu_total <= args.cap_gib * 2**30, (part, variant.name)


def test_the_head_names_every_part() -> None:
    head = SCRIPT.read_text().split("\nset -")[0]
    named = set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", head))
    assert set(PARTS) <= named
    done = subprocess.run(["bash", SCRIPT, "nothing", "/tmp"], capture_output=True, text=True)
    assert done.returncode == 2 and "head of this file" in done.stderr
