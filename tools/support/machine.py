"""What this machine has: GPUs, host memory under the job's limits, shared memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from pipeline.preflight.survey import Gpu, Machine

CGROUPS = Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")


def read_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices PyTorch will use, in its order (CUDA_VISIBLE_DEVICES counts)."""
    import torch  # seconds, which `--help` and a wrong configuration need not wait for

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    return tuple(gpus)


def cgroup_free(own: str, root: Path = CGROUPS) -> int | None:
    """Bytes the control groups of this process still allow; None: no limit.

    Args:
        own: text of /proc/self/cgroup.
        root: where control groups are mounted.
    """
    lines = [line.split(":", 2) for line in own.splitlines() if line.count(":") >= 2]
    free = []
    for _, controllers, name in lines:
        if controllers not in ("", "memory"):
            continue
        top = root if controllers == "" else root / "memory"
        folder = top / name.lstrip("/")
        # A container may show its own group as the root, under a name that only the host knows.
        for group in [folder, *folder.parents]:
            if top in (group, *group.parents):
                free.append(_group_free(group))
    known = [amount for amount in free if amount is not None]
    return min(known) if known else None


def _group_free(group: Path) -> int | None:
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
        return max(0, most - max(0, used - int(rows.get(cache, 0))))
    return None


def read_machine() -> Machine:
    """Everything the preflight looks at."""
    host, limit = psutil.virtual_memory().available, "this machine"
    own = Path("/proc/self/cgroup")
    allowed = cgroup_free(own.read_text()) if own.is_file() else None
    if allowed is not None and allowed < host:
        host, limit = allowed, "the container's or job's limit"
    shared = shutil.disk_usage(SHARED).free if SHARED.is_dir() else None
    return Machine(read_gpus(), host, limit, shared)
