"""How much memory this machine's GPUs have, asked of the driver's own program: no torch."""

from __future__ import annotations

import subprocess

_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


def smallest_gpu() -> int | None:
    """Bytes of the smallest GPU of this machine; None where there is none."""
    try:
        told = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=True).stdout
        return min(int(line) for line in told.split()) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
