"""Where `parallel`, `pipeline` and `tools` lie, and how this process and those it starts find them first.

Their names are common, and `python -m` looks in the current folder first. So a wheel keeps them inside
`longspan/rooms`, where they hide nobody's packages and nobody's hide them, and `enter` puts that folder before every
other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "rooms"
HOME = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2]
"""The folder of the packages: the wheel's, or (an editable install) the repository."""


def enter() -> None:
    """Make `import tools` mean ours, here and in every Python process that is started from here."""
    home = str(HOME)
    sys.path[:] = [home, *(path for path in sys.path if path != home)]
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != home]
    os.environ["PYTHONPATH"] = os.pathsep.join([home, *others])
    # `python -m` puts the current folder before PYTHONPATH unless told not to.
    os.environ["PYTHONSAFEPATH"] = "1"
