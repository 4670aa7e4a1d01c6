"""What this machine has: GPUs, host memory under the job's limits, shared memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.planner.host_memory import host_left
from pipeline.planning.base_form import capability_of
from pipeline.preflight.survey import Gpu, Machine

SHARED = Path("/dev/shm")


def read_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices PyTorch will use, in its order (CUDA_VISIBLE_DEVICES counts)."""
    import torch  # seconds, which `--help` and a wrong configuration need not wait for

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = capability_of(torch.cuda.get_device_capability(index))
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free, capability))
    return tuple(gpus)


def read_machine() -> Machine:
    """Everything the preflight looks at."""
    shared = shutil.disk_usage(SHARED).free if SHARED.is_dir() else None
    return Machine(read_gpus(), *host_left(), shared)
