"""Host memory that a job may have: the machine's, under its container's or batch system's limit. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def cgroup_free(own: str, root: Path = CGROUPS) -> int | None:
    """Bytes the control groups of this process still allow; None: no limit.

    Args:
        own: text of /proc/self/cgroup.
        root: where control groups are mounted.
    """
    known = [limit - used for limit, used in _groups(own, root)]
    return min(known) if known else None


def host_left() -> tuple[int, str]:
    """Bytes of host memory that are free, and whose limit that is, in words."""
    free = psutil.virtual_memory().available
    allowed = cgroup_free(OWN_GROUPS.read_text()) if OWN_GROUPS.is_file() else None
    if allowed is not None and allowed < free:
        return allowed, "the container's or job's limit"
    return free, "this machine"


def host_limit() -> int:
    """Bytes of host memory that this process and its neighbours may have, whatever is in use now."""
    limits = [psutil.virtual_memory().total]
    if OWN_GROUPS.is_file():
        limits += [limit for limit, _ in _groups(OWN_GROUPS.read_text(), CGROUPS)]
    return min(limits)


def _groups(own: str, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of every control group above this process that has a limit."""
    lines = [line.split(":", 2) for line in own.splitlines() if line.count(":") >= 2]
    for _, controllers, name in lines:
        if controllers not in ("", "memory"):
            continue
        top = root if controllers == "" else root / "memory"
        folder = top / name.lstrip("/")
        # A container may show its own group as the root, under a name that only the host knows.
        for group in [folder, *folder.parents]:
            if top in (group, *group.parents):
                found = _group(group)
                if found is not None:
                    yield found


def _group(group: Path) -> tuple[int, int] | None:
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((group / limit).read_text())  # "max" is no number: no limit
            used = int((group / usage).read_text())
            rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # Cached files are given back when memory is asked for.
        return most, min(most, max(0, used - int(rows.get(cache, 0))))
    return None
