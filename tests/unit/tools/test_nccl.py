"""launch/nccl.env: what shells make of it, that ranks get it, and that no other file tells NCCL anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from tools.support.nccl import NCCL_FILE, nccl_settings

ROOT = Path(__file__).parents[3]


def sourced(path: Path) -> dict[str, str]:
    """The variables that bash has after sourcing a file, beyond its own."""
    words = ["env", "-i", "bash", "--norc", "-c", f"set -a; . {path}; env -0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    pairs = (line.split("=", 1) for line in done.stdout.split("\0") if line)
    return {name: value for name, value in pairs if name not in ("PWD", "SHLVL", "_")}


def test_a_shell_reads_it_alike(tmp_path: Path) -> None:
    assert nccl_settings(NCCL_FILE) == sourced(NCCL_FILE) != {}
    # What is left out may be taken in as it stands.
    everything = tmp_path / "nccl.env"
    everything.write_text(re.sub(r"^#(?=[A-Z])", "", NCCL_FILE.read_text(), flags=re.M))
    found = nccl_settings(everything)
    assert found == sourced(everything) and found["NCCL_NVLS_ENABLE"] == "0"
    assert "NCCL_NVLS_ENABLE" not in nccl_settings(NCCL_FILE), "multicast is the user's to switch off"


@pytest.mark.parametrize("line", ["NCCL_DEBUG = WARN", 'NCCL_DEBUG="WARN"x y', "export NCCL_DEBUG=WARN", "WARN"])
def test_a_line_that_says_nothing_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "nccl.env"
    path.write_text(f"# reason\n{line}\n")
    with pytest.raises(ConfigError, match="nccl.env, line 2: .* is not NAME=value"):
        nccl_settings(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        nccl_settings(tmp_path / "nowhere")


def test_no_other_launch_file_sets_what_nccl_does() -> None:
    files = [path for path in (ROOT / "launch").rglob("*") if path.is_file() and path.suffix not in (".xz", ".env")]
    setting = re.compile(r"\b(?:NCCL|TORCH_NCCL|GLOO)_\w+\b\s*(?:=|,\s*value|:)")
    assert setting.search('{name: NCCL_DEBUG, value: "WARN"}') and setting.search("export NCCL_DEBUG=WARN")
    assert [path for path in files if setting.search(path.read_text())] == []


def test_ranks_get_it_and_the_users_own_wins(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text("import os\nprint('told', os.environ['NCCL_DEBUG'])\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_")}
    for own, told in (({}, "told WARN"), ({"NCCL_DEBUG": "INFO"}, "told INFO")):
        words = [sys.executable, "-m", "tools.torchrun", "--standalone", "--nproc-per-node", "1", str(rank)]
        done = subprocess.run(words, cwd=ROOT, env=kept | own, capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines() == [told], done.stderr
