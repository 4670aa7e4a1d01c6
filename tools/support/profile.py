"""Where a step's time goes on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def print_profile(work: Callable[[], object], told: bool) -> None:
    """Run `work` once more and, where `told`, print its kernels by time; every rank calls it, so that none waits."""
    with torch.profiler.profile() as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if told:
        averages = profiler.key_averages()
        print(averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70), flush=True)
