"""`longspan`: every program by its name, from any folder, whatever that folder's own packages are called."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from tools.console import command, home, table
from tools.console.command import application
from tools.console.table import BENCHES, Program, there

ROOT = Path(__file__).parents[3]
PROGRAMS = [*there(), *there(BENCHES)]
WORK = """
import sys
sys.path[:] = [path for path in sys.path if path not in ("", {root!r})]
sys.path.append({package!r})
import importlib.util
spec = importlib.util.spec_from_file_location("longspan", {file!r}, submodule_search_locations=[{package!r}])
sys.modules["longspan"] = importlib.util.module_from_spec(spec)
sys.argv = ["longspan", *{words!r}]
from longspan.command import main
main()
"""


def longspan(cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The console script of an installed package: `longspan` is found, the folder of the repository is not."""
    package = ROOT / "tools/console"
    program = WORK.format(root=str(ROOT), package=str(package), file=str(package / "__init__.py"), words=words)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        # -I: no current folder, as for a console script.
        [sys.executable, "-W", "ignore", "-I", "-c", program],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_listed_program_starts_with_main() -> None:
    """Its source has a `main`, and the lists of the whole name each of them once."""
    assert all(re.search(r"^def main\(", program.file.read_text(), re.M) for program in PROGRAMS)
    names = [program.name for program in there()]
    assert len(names) == len(set(names))
    expected = "train evaluate export import prepare merge doctor preflight report inspect study".split()
    assert set(expected) <= set(names)
    shown = CliRunner().invoke(application(), ["--help"]).output
    assert [name for name in names if not re.search(rf"^  {name}  +\S", shown, re.M)] == []
    assert len(shown.splitlines()) <= 40 and max(map(len, shown.splitlines())) <= 80, "a screen"


def test_a_program_of_another_version_is_not_listed() -> None:
    assert there((Program("nothing", "tools.no_such_program", "Nothing."),)) == []


def test_words_reach_the_program_as_they_are_and_its_code_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, list[str], str]] = []

    def start(program: Program, arguments: list[str], called: str) -> int:
        got.append((program.module, arguments, called))
        return 75

    monkeypatch.setattr(command, "start", start)
    words = ["--set", "a.b=c", "--", "-x", "--help", "--unknown", "7"]
    done = CliRunner().invoke(application(), ["evaluate", *words])
    assert done.exit_code == 75 and got == [("tools.evaluate", words, "longspan evaluate")]
    assert CliRunner().invoke(application(), ["bench", "step", "--tp", "8"]).exit_code == 75
    assert got[1] == ("tools.bench.step", ["--tp", "8"], "longspan bench step")


def test_a_wrong_command_is_code_2() -> None:
    done = longspan(ROOT, "evalute")
    assert done.returncode == 2 and done.stderr.startswith("error: No such command 'evalute'") and not done.stdout
    assert "evaluate" in done.stderr and done.stderr.count("\n") == 1, "it suggests the nearest"
    for words, said in ((["bench", "stepp"], "'stepp'"), (["--vers"], "--version"), (["--vers=1"], "--version")):
        done = longspan(ROOT, *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
        assert done.stderr.count("\n") == 1
    done = longspan(ROOT)
    assert done.returncode == 2 and done.stderr.startswith("Usage: longspan ") and "  train " in done.stderr
    done = longspan(ROOT, "--version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("longspan ")


def test_a_folder_of_the_user_with_our_names_hides_nothing(tmp_path: Path) -> None:
    """In this process, and in those that it starts."""
    for name in ("tools", "pipeline", "parallel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported the folder of the user')")
    done = longspan(tmp_path, "inspect", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: longspan inspect "), done.stderr
    # With processes: refused by the preflight, which is one of its own.
    (tmp_path / "run.yaml").write_text("model: {path: nowhere, context: 64}\ndata: {path: x}\noutput: y\n")
    done = longspan(tmp_path, "train", "--config", "run.yaml", "--nproc", "2")
    assert done.returncode == 2 and done.stderr == (
        "error: train: missing in run.yaml; add the section train with steps.\n"
    )


def test_without_it_the_folder_of_the_user_would_hide_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The children of `enter` against those of a plain PYTHONPATH."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise SystemExit(9)")

    def child() -> int:
        words = [sys.executable, "-m", "tools.inspect_checkpoint", "--help"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True).returncode

    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert child() == 9
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    # Taken back at the end, whatever `enter` sets.
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    home.enter()
    assert sys.path[0] == str(ROOT) and os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}/elsewhere"
    assert child() == 0


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("longspan ev", ["evaluate"]),
        ("longspan bench s", ["scaling", "save", "step", "stream", "survive"]),
        ("longspan evaluate --len", ["--lengths"]),
        ("longspan train --nn", ["--nnodes"]),
        ("longspan train --s", ["--set", "--stop-after"]),
        ("longspan train --nproc", ["--nproc"]),
        ("longspan bench da", ["data"]),
        ("longspan bench step --micro", ["--micro-batch", "--micro-batches"]),
        ("longspan merge --no", ["--no-verify"]),
        ("longspan merge --orig", ["--original-context"]),
        ("longspan export --fo", ["--force", "--format"]),
        ("longspan generate --th", ["--theta"]),
        ("longspan generate --fo", []),
        ("longspan train ", []),
    ],
)
def test_completion(typed: str, offered: list[str]) -> None:
    """As bash asks for it."""
    words = typed.split(" ")
    variables = {"_LONGSPAN_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = CliRunner().invoke(application(), [], env=variables, prog_name="longspan")
    assert done.output.split() == offered


class Made(BaseException):
    """A command's parser, at the moment it was to read a command line."""


def parser_of(program: Program, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a command really makes."""

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        raise Made(self)

    name = f"{program.module}.__main__" if program.file.name == "__main__.py" else program.module
    module = importlib.import_module(name)
    bench = "bench " if program in BENCHES else ""
    monkeypatch.setattr(sys, "argv", [f"longspan {bench}{program.name}"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Made) as made:
        module.main([])
    parser: argparse.ArgumentParser = made.value.args[0]
    return parser


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.module)
def test_a_help_fits_a_screen_and_a_shell_completes_what_it_lists(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = parser_of(program, monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    lines = parser.format_help().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80, "\n".join(lines)
    assert lines[0].startswith(f"usage: {sys.argv[0]} ") and [line for line in lines if line != line.rstrip()] == []
    either = [group for group in parser._mutually_exclusive_groups if group.required]
    inside = [action for group in either for action in group._group_actions]
    needed = [action for action in parser._actions if action.required or action in inside]
    usage = parser.format_usage()
    assert [action for action in needed if (action.option_strings or [action.dest])[0] not in usage] == []
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert program.options == sorted(word for action in shown for word in action.option_strings if word[:2] == "--")


def test_the_list_of_benches_fits_a_screen() -> None:
    lines = CliRunner().invoke(application(), ["bench", "--help"]).output.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80


def starts(path: Path) -> bool:
    """Whether a file or a package of tools/ is a program."""
    source = path / "__main__.py" if path.is_dir() else path
    return '__name__ == "__main__"' in source.read_text()


def test_the_table_names_all_commands_of_tools() -> None:
    """A new program of tools/ gets a name, or is one of those that serve others."""
    others = {"tools.pages", "tools.torchrun", "tools.console"}
    named = {program.module for program in (*table._ALL, *BENCHES)}
    paths = [path for path in (ROOT / "tools").iterdir() if path.suffix == ".py" or (path / "__main__.py").is_file()]
    modules = {f"tools.{path.stem}" for path in paths if starts(path)}
    modules |= {f"tools.bench.{path.stem}" for path in (ROOT / "tools/bench").glob("*.py") if starts(path)}
    assert modules - others == named
