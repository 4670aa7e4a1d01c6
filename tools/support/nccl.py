"""What NCCL is told: launch/nccl.env, where each setting has its reason."""

from __future__ import annotations

import re
from pathlib import Path

from parallel.errors import ConfigError

NCCL_FILE = Path(__file__).parents[2] / "launch" / "nccl.env"
_LINE = re.compile(r"([A-Z][A-Z0-9_]*)=(\S+)")


def nccl_file() -> Path:
    """The file that holds here: a copy that `longspan init` wrote into this folder, or the package's own."""
    own = Path("launch") / NCCL_FILE.name
    return own if own.is_file() else NCCL_FILE


def nccl_settings(path: Path) -> dict[str, str]:
    """Variables of a file of NAME=value lines, which shells and `docker --env-file` read alike: no quotes, no blanks.

    Raises:
        ConfigError: the file cannot be read, or a line is neither empty, a comment nor NAME=value.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); restore it from the release.") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        matched = _LINE.fullmatch(line)
        if matched is None:
            raise ConfigError(f"{path}, line {number}: '{line}' is not NAME=value, without blanks or quotes; mend it.")
        found[matched[1]] = matched[2]
    return found
