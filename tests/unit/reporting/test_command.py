"""Every command ends alike: 2 with one sentence for what a user can mend, 130 after Ctrl-C, and never a traceback."""

from __future__ import annotations

import argparse
import ast
import errno
import getpass
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import DataError
from pipeline.reporting import command as module
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number

ROOT = Path(__file__).parents[3]
RANKS = {"tools/support/doctor_rank.py"}
"""Started by another command only, which reads what they say."""
GONE = "/nowhere/at-all"
# Every command with arguments that are well formed and name something that is not there.
MISSING: dict[str, list[str]] = {
    "pipeline.train": ["--config", GONE],
    "tools.bench.data": ["--tokenizer", GONE],
    "tools.bench.load": ["--model", GONE],
    "tools.doctor": ["--config", GONE],
    "tools.dry_run": ["--config", GONE],
    "tools.evaluate": ["--config", GONE, "--state", "trained"],
    "tools.export_hf": ["--run", GONE, "--output", GONE],
    "tools.fetch_demo": ["--cache", "/proc/at-all"],
    "tools.generate": ["--model", GONE, "--prompt", "x"],
    "tools.import_hf": [GONE, "/nowhere/out"],
    "tools.inspect_checkpoint": [GONE],
    "tools.launch": ["--config", GONE],
    "tools.merge_lora": ["--adapter", GONE, "--base", GONE, "--context", "64", "--output", "/nowhere/out"],
    "tools.plan": ["--config", GONE],
    "tools.preflight": ["--config", GONE],
    "tools.answer_questions": ["--model", GONE, "--questions", GONE],
    "tools.make_questions": ["--input", GONE, "--output", "/nowhere/out"],
    "tools.mix_text": ["--input", GONE, "--output", "/nowhere/out"],
    "tools.prepare_data": ["--input", GONE, "--output", "/nowhere/out", "--tokenizer", GONE],
    "tools.report": ["--run", GONE],
    "tools.study.__main__": ["--model", GONE, "--text", GONE],
    "tools.tiny_run": ["--config", GONE],
}
ELSEWHERE = {
    "tools.init",
    "tools.pages",
    "tools.torchrun",
    *(
        f"tools.bench.{name}"
        for name in "attention calibrate context convert peers plan products save scaling step stream survive".split()
    ),
}
"""Commands that take no path, or only one to write."""


def commands() -> list[str]:
    """Modules that a user starts with `python -m`."""
    found = []
    for path in [*(ROOT / "tools").rglob("*.py"), ROOT / "pipeline/train.py"]:
        name = path.relative_to(ROOT)
        guard = any(
            isinstance(node, ast.If) and "__main__" in ast.dump(node) for node in ast.parse(path.read_text()).body
        )
        if guard and str(name) not in RANKS:
            found.append(".".join(name.with_suffix("").parts))
    return sorted(found)


def test_the_list_is_complete() -> None:
    assert set(commands()) == MISSING.keys() | ELSEWHERE


@pytest.mark.parametrize("name", sorted(MISSING))
def test_a_missing_path_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(name).main
    capsys.readouterr()  # what libraries say at their import
    assert main(MISSING[name]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and len(told.err.splitlines()) == 1 and told.err.endswith(".\n"), told.err
    assert "at-all" in told.err and not told.out
    with pytest.raises(SystemExit) as wrong:
        main(["--no-such-option"])
    assert wrong.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith(" --help.\n"), "no usage before it"


def test_a_wrong_argument_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["longspan x"])
    parser = Parser("tools.x", "Do it: `longspan x --count 3`.\n\nNot shown.")
    parser.add_argument("--count", type=whole_number())
    parser.add_argument("--gb", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--kind", choices=("a", "b"), required=True)
    assert "Do it.\n" in parser.format_help() and "Not shown" not in parser.format_help()
    end = "; see longspan x --help.\n"
    for words, said in {
        "--count 0": "--count: must be a whole number, 1 or more, got '0'",
        "--count two": "--count: must be a whole number, 1 or more, got 'two'",
        "--gb much": "--gb: must be a number, got 'much'",
        "--seed 1.5": "--seed: must be a whole number, got '1.5'",
        "--seed": "--seed: expected one argument",
        "--kind": "--kind: expected one argument",
        "": "the following arguments are required: --kind",
    }.items():
        with pytest.raises(SystemExit) as wrong:
            parser.parse_args(words.split())
        assert wrong.value.code == 2 and capsys.readouterr().err == f"error: {said}{end}"
    with pytest.raises(SystemExit):
        parser.error("--gb: is not this one's; leave it out.")
    assert capsys.readouterr().err == "error: --gb: is not this one's; leave it out.\n"
    assert parser.parse_args(["--kind", "a", "--count", "3"]).count == 3


def test_ctrl_c_is_one_line_from_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    mains = [importlib.import_module(name).main for name in commands() if name != "tools.torchrun"]
    capsys.readouterr()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupt)
    for main in mains:
        assert main([]) == 130
        assert capsys.readouterr().err == "interrupted.\n"


def test_which_errors_are_a_users(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> int:
        @command
        def main(arguments: Sequence[str] | None = None) -> int:
            raise error

        return main([])

    for error, said in {
        DataError("Put it back."): "error: Put it back.\n",
        PermissionError(errno.EACCES, "Permission denied", "/x"): "error: /x: cannot be used (Permission denied); mend",
        OSError(errno.ENOSPC, "No space left on device"): "error: A file could not be written (No space left",
    }.items():
        assert fails(error) == 2
        assert capsys.readouterr().err.startswith(said)
    # Faults of the program's, and a broken connection that is not standard output, keep their traceback.
    for fault in (ValueError("bug"), OSError(errno.EIO, "no file named"), BrokenPipeError(errno.EPIPE, "a socket's")):
        with pytest.raises(type(fault)):
            fails(fault)


def run(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "ignore", *code.split(maxsplit=1)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, timeout=120)


def test_a_reader_that_left_is_no_error(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(
        "import sys\nfrom pipeline.reporting.command import command\n"
        "@command\ndef main(arguments=None):\n    print('line\\n' * 200_000)\n    return 0\n"
        "sys.exit(main())\n"
    )
    piped = f"set -o pipefail; {sys.executable} {script} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", piped], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "line\n", "")


def test_ctrl_c_while_a_command_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("raise KeyboardInterrupt\n")
    done = run("-m tools.inspect_checkpoint", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stderr == "interrupted.\n" and done.returncode == -2, "by the signal: a shell's 130"


def test_nothing_is_said_before_the_sentence() -> None:
    """torch's word on CUDA_HOME, which it says on a CPU where there is a toolkit."""
    cpu = os.environ | {"CUDA_HOME": "/usr/local", "CUDA_VISIBLE_DEVICES": ""}

    def said(*words: str) -> str:
        whole = [sys.executable, "-W", "ignore", *words]
        return subprocess.run(whole, cwd=ROOT, env=cpu, capture_output=True, text=True, timeout=120).stderr

    told = said("-m", "tools.dry_run", "--config", "nowhere.yaml")
    assert told.startswith("error: nowhere.yaml: ") and told.count("\n") == 1
    assert "CUDA_HOME" in said("-c", "import torch.utils.cpp_extension"), "which is said otherwise"


def test_a_user_without_an_entry_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `docker run --user 12345`: torch asks getpass for a name to call its caches by."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    hook = sys.excepthook
    module.starting()
    assert "LOGNAME" not in os.environ and sys.excepthook is hook, "imported by something else than `python -m`"
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "excepthook", hook)
    module.starting()
    assert getpass.getuser() == f"uid-{os.getuid()}"


@pytest.mark.parametrize(
    ("module", "option", "least"),
    [
        ("pipeline.train", "--profile", 1),
        ("tools.answer_questions", "--first", 1),
        ("tools.answer_questions", "--show", 0),
        ("tools.answer_questions", "--tokens", 1),
        ("tools.doctor", "--processes", 1),
        ("tools.generate", "--chunk", 1),
        ("tools.generate", "--max-new", 1),
        ("tools.tiny_run", "--nproc", 1),
    ],
)
def test_counts_of_nothing_are_refused_alike(
    module: str, option: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(module).main([f"{option}={least - 1}"])
    assert f"{option}: must be a whole number, {least} or more, got '{least - 1}'" in capsys.readouterr().err
