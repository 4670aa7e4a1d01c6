"""Ranks whose processor is slower than the others': each times the same product by itself, without the others.

Within a step ranks wait for each other in every layer, so that a slow one makes all of them slow alike: no time of a
step tells which it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from parallel.world.collectives import of_every_rank
from parallel.world.groups import Groups

PACE_EVERY = 100
"""Steps between two looks; one takes milliseconds."""
SLOW = 1.15
"""Seconds over the median's, above which a rank is named: GPUs of one kind differ by a few hundredths."""
SIZE = {"cuda": 4096, "cpu": 256}
"""Rows and columns of the matrices that are multiplied."""
TIMES = 10
"""Products of a look, of which the fastest counts: what else the machine does must not be taken for the GPU's pace."""


def pace(device: torch.device) -> float:
    """Seconds of one product on this rank's device, bf16 on a GPU and fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    size = SIZE[device.type]
    one = torch.ones(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    out = torch.empty_like(one)
    best = float("inf")
    for _ in range(TIMES):
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(one, one, out=out)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def named_slow(seconds: Sequence[float], hosts: Sequence[str], limit: float = SLOW) -> list[str]:
    """A sentence for each rank that takes `limit` times the median or more.

    Args:
        seconds: of every rank.
        hosts: name of every rank's machine.
    """
    middle = statistics.median_low(seconds)
    return [
        f"rank {rank} on {host}: its processor takes {each / middle:.2f} times as long as most ranks' for the same "
        "product, and all of them wait for it; see its clock and temperature (nvidia-smi -q -d PERFORMANCE), or leave "
        "that machine out."
        for rank, (each, host) in enumerate(zip(seconds, hosts, strict=True))
        if each >= limit * middle
    ]


def slow_ranks(groups: Groups, own: float | None = None) -> list[str]:
    """What `named_slow` says of all ranks; alike on every rank, all of which must call this.

    Args:
        own: this rank's seconds; None: measured now.
    """
    world = groups.plan.world_size
    if world == 1 or groups.fake:
        return []
    found = pace(groups.device) if own is None else own
    known = of_every_rank(groups, [found])
    return named_slow([seconds for (seconds,), _ in known], [host for _, host in known])
