"""launch/setup.sh and launch/test.sh with stand-in Pythons and an otherwise empty PATH: no network, no installation.

The stand-in is a shell script that answers what setup.sh asks of a Python and writes down each pip call. A real
installation is what `.ci/run` does before these tests start.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COREUTILS = ("bash", "cat", "chmod", "cksum", "cp", "dirname", "find", "ls", "mkdir", "rm", "sed", "sort")
STAND_IN = """\
#!{bash}
# LOG and FAILURES are set by the test.
case "$1 ${{2-}}" in
  "--version "*) echo "Python 3.12.99" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo made > "$3/pyvenv.cfg" ;;
  "-m pip")
    echo "${{@:3}}" >> "$LOG"
    if [[ "$3" == install && -s "$FAILURES" ]]; then
      read -r how < "$FAILURES"
      sed -i 1d "$FAILURES"
      if [[ $how == hang ]]; then exec {sleep} 1000; fi
      exit 1
    fi
    ;;
  "-c "*) exit 0 ;;
  *) echo "stand-in: unexpected $*" >&2; exit 9 ;;
esac
"""
BROKEN_SHIM = '#!{bash}\necho "pyenv: python3.12: command not found" >&2\nexit 127\n'


@dataclass
class Sandbox:
    """A copy of the scripts and declarations, and a PATH that holds only what the test puts there."""

    root: Path
    repo: Path = field(init=False)
    commands: Path = field(init=False)
    log: Path = field(init=False)
    failures: Path = field(init=False)

    def __post_init__(self) -> None:
        self.repo, self.commands = self.root / "a repo", self.root / "bin"
        self.log, self.failures = self.root / "pip.log", self.root / "failures"
        (self.repo / "launch").mkdir(parents=True)
        self.commands.mkdir()
        for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "launch/setup.sh", "launch/test.sh"):
            shutil.copy(ROOT / name, self.repo / name)
        for name in COREUTILS:
            found = shutil.which(name)
            assert found, name
            (self.commands / name).symlink_to(found)
        self.script(self.commands / "sleep", "#!{bash}\n")  # no pauses between retries
        self.log.touch()
        self.failures.touch()

    def script(self, path: Path, text: str) -> None:
        """Write an executable shell script."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(bash=shutil.which("bash"), sleep=shutil.which("sleep")))
        path.chmod(0o755)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Run a script of the copy, from elsewhere."""
        environment = {
            "PATH": str(self.commands),
            "HOME": str(self.root / "home"),
            "LOG": str(self.log),
            "FAILURES": str(self.failures),
        }
        return subprocess.Popen(
            ["bash", str(self.repo / command[0]), *command[1:]],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def installs(self) -> list[str]:
        """pip install calls so far."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("install")]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """A copy with no Python anywhere."""
    return Sandbox(tmp_path)


def test_no_python_says_what_to_install(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.commands / "python3.12", BROKEN_SHIM)
    code, output = sandbox.run("launch/setup.sh")
    assert code == 1
    assert "no working Python >= 3.12" in output and "apt-get install python3.12" in output
    assert "command not found" not in output
    assert not (sandbox.repo / ".venv").exists()


def test_a_broken_shim_is_passed_over_for_pyenvs_newest(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.commands / "python3.12", BROKEN_SHIM)
    sandbox.script(sandbox.commands / "pyenv", f"#!{{bash}}\necho '{sandbox.root}/pyenv'\n")
    for version in ("3.12.1", "3.12.10", "3.11.7"):
        sandbox.script(sandbox.root / "pyenv" / "versions" / version / "bin" / "python", STAND_IN)
    code, output = sandbox.run("launch/setup.sh")
    assert code == 0, output
    assert "pyenv/versions/3.12.10/bin/python" in output


def test_uv_is_asked_last(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.root / "uv-python", STAND_IN)
    sandbox.script(
        sandbox.commands / "uv", f'#!{{bash}}\n[[ "$1 $2" == "python find" ]] && echo "{sandbox.root}/uv-python"\n'
    )
    code, output = sandbox.run("launch/setup.sh")
    assert code == 0, output
    assert "uv-python" in output


def test_a_second_run_does_nothing_until_a_declaration_changes(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.commands / "python3.13", STAND_IN)
    code, output = sandbox.run("launch/setup.sh")
    assert code == 0, output
    assert len(sandbox.installs) == 2
    assert all("--constraint constraints.txt" in line for line in sandbox.installs)
    assert sandbox.installs[1].endswith("--editable .[dev]")
    code, output = sandbox.run("launch/setup.sh")
    assert (code, output) == (0, "setup: .venv is up to date.\n")
    assert len(sandbox.installs) == 2
    with (sandbox.repo / "constraints.txt").open("a") as constraints:
        constraints.write("more==1.0\n")
    code, output = sandbox.run("launch/setup.sh")
    assert code == 0 and len(sandbox.installs) == 4
    assert "making" not in output, "the environment itself is kept"


def test_a_failing_network_is_retried_then_told(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.commands / "python3", STAND_IN)
    sandbox.failures.write_text("fail\nfail\n")
    code, output = sandbox.run("launch/setup.sh")
    assert code == 0 and output.count("failed; again in") == 2
    assert len(sandbox.installs) == 4
    (sandbox.repo / ".venv" / ".longspan-setup").unlink()
    sandbox.failures.write_text("fail\nfail\nfail\n")
    code, output = sandbox.run("launch/setup.sh")
    assert code == 1 and "pip failed three times" in output
    assert not (sandbox.repo / ".venv" / ".longspan-setup").exists()


def test_an_interrupted_run_leaves_no_stamp_and_the_next_one_mends(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.commands / "python3.12", STAND_IN)
    assert sandbox.run("launch/setup.sh")[0] == 0
    with (sandbox.repo / "setup.cfg").open("a") as declarations:
        declarations.write("# changed\n")
    sandbox.failures.write_text("hang\n")
    process = sandbox.start("launch/setup.sh")
    for _ in range(200):
        if len(sandbox.installs) == 3:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert len(sandbox.installs) == 3
    code, output = sandbox.run("launch/test.sh")
    assert code == 1 and "run launch/setup.sh first" in output
    code, output = sandbox.run("launch/setup.sh")
    assert code == 0 and "up to date" not in output
    assert len(sandbox.installs) == 5


def test_another_folder_is_relative_to_the_caller(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.root / "my python", STAND_IN)
    code, output = sandbox.run("launch/setup.sh", "--venv", "other venv", "--python", "./my python")
    assert code == 0, output
    assert (sandbox.root / "other venv" / ".longspan-setup").is_file()
    assert not (sandbox.repo / ".venv").exists()


def test_what_is_not_an_environment_is_never_removed(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.commands / "python3.12", STAND_IN)
    precious = sandbox.root / "thesis" / "chapter1.txt"
    precious.parent.mkdir()
    precious.write_text("words")
    code, output = sandbox.run("launch/setup.sh", "--venv", str(precious.parent))
    assert code == 1 and "is not a Python environment" in output
    assert precious.read_text() == "words"


def test_a_dead_environment_is_made_again(sandbox: Sandbox) -> None:
    sandbox.script(sandbox.commands / "python3.12", STAND_IN)
    assert sandbox.run("launch/setup.sh")[0] == 0
    (sandbox.repo / ".venv" / "bin" / "python").unlink()
    code, output = sandbox.run("launch/setup.sh")
    assert code == 0 and "making .venv" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--python", "nowhere/python"], "is not a working Python >= 3.12"),
        (["--venv"], "--venv needs a value"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_wrong_options(sandbox: Sandbox, arguments: list[str], said: str) -> None:
    code, output = sandbox.run("launch/setup.sh", *arguments)
    assert code in (1, 2) and said in output


def test_test_script_needs_the_environment(sandbox: Sandbox) -> None:
    code, output = sandbox.run("launch/test.sh")
    assert code == 1 and "run launch/setup.sh first" in output
