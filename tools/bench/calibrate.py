"""Measure the GPU at hand for the planner: `longspan bench calibrate --output mine.yaml`, under two minutes.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from parallel.errors import ConfigError
from pipeline.config.paths import user_path
from pipeline.planner.gpus import RATES, SHARES, Gpu, named_by
from pipeline.planner.host_memory import host_limit
from pipeline.planning.base_form import BASE_CAPABILITY, capability_of
from pipeline.planning.memory import GIB
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser

SHAPES = ((57344, 8192), (8192, 28672))
"""(O, I) of 70B's frozen matrices that nearly all products are made with, for TOKENS rows."""
TOKENS = 8192
COPIED = GIB
"""Bytes of a copy."""
SECONDS = 0.25
"""Of each measurement, after it has warmed up. Products for seconds on end are slowed for the power they draw: an H200
makes 674 TFLOP/s of them then, and 745 where they are timed one by one."""
NETWORK = 25e9
"""Bytes a second a GPU is taken to have to other machines, where nothing is known of it: 200 Gbit/s."""


def seconds_of(work: Callable[[], object], lasting: float = SECONDS) -> float:
    """Seconds of one `work`, on the current device, the mean of as many as fit."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        work()
    begin.record()
    work()
    end.record()
    end.synchronize()
    times = max(3, int(lasting / max(begin.elapsed_time(end) / 1e3, 1e-5)))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def products(dtype: torch.dtype) -> float:
    """Operations a second of forward products and input gradients, of random numbers: zeros draw less power."""
    operations = seconds = 0.0
    for rows, columns in SHAPES:
        # x W^T, and g W as it is made: FP8 products read both factors along what is summed, and W is turned for that.
        for inner, outer in ((columns, rows), (rows, columns)):
            left = torch.randn(TOKENS, inner, device="cuda", dtype=torch.bfloat16)
            right = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16)
            if dtype == torch.bfloat16:
                turned = right if inner == columns else right.t().contiguous().t()
                work = partial(torch.mm, left, turned.t())
            else:
                scales = (torch.ones(TOKENS, 1, device="cuda"), torch.ones(1, outer, device="cuda"))
                factors = left.to(dtype), right.to(dtype).t(), *scales
                work = partial(torch._scaled_mm, *factors, out_dtype=torch.bfloat16, use_fast_accum=True)
            operations += 2 * TOKENS * rows * columns
            seconds += seconds_of(work)
    return operations / seconds


def measure() -> dict[str, float]:
    """Every rate that this machine can show."""
    found = {"bf16": products(torch.bfloat16)}
    if capability_of(torch.cuda.get_device_capability()) >= BASE_CAPABILITY:
        found["fp8"] = products(torch.float8_e4m3fn)
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["hbm"] = 2 * COPIED / seconds_of(lambda: target.copy_(source))
    pinned = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    found["pcie"] = COPIED / seconds_of(lambda: target.copy_(pinned, non_blocking=True))
    if torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1):
        other = torch.empty(COPIED, dtype=torch.uint8, device="cuda:1")
        found["nvlink"] = COPIED / seconds_of(lambda: target.copy_(other))
    return found


def description(
    found: dict[str, float], device: str, memory: int, gpus: int, host: int, capability: float
) -> dict[str, Any]:
    """An entry as gpus.yaml has them.

    Args:
        found: measured rates.
        device: as PyTorch calls it.
        memory, host: bytes of the GPU, of the machine.
        gpus: of the machine.
        capability: CUDA's compute capability.
    """
    known: Gpu | None = named_by(device)
    sold: dict[str, float | None] = {}
    for name in RATES:
        guess = found[name] / SHARES[name] if name in found else (NETWORK if name == "network" else None)
        sold[name] = guess if known is None else known.sold[name]
    # A copy between two GPUs alone is no collective's rate: it says what the link is sold with, where nobody else does.
    kept = {name: float(f"{rate:.4g}") for name, rate in found.items() if name != "nvlink"}
    return {
        "capability": capability,
        "memory_gib": round(memory / GIB, 2),
        "sold": {name: None if rate is None else float(f"{rate:.4g}") for name, rate in sold.items()},
        "measured": kept,
        "gpus_a_node": gpus if known is None else max(gpus, known.gpus_a_node),
        "host_gib_a_gpu": max(1, host // gpus // GIB),
        "source": f"tools.bench.calibrate on {device}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}",
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence."""
    parser = Parser("tools.bench.calibrate", __doc__, "BENCHES.md")
    parser.add_argument("--output", type=user_path, default=Path("gpu.yaml"), help="file to write (default gpu.yaml)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no GPU to measure; run longspan bench calibrate on the machine to plan for.")
    device, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    own = capability_of(torch.cuda.get_device_capability())
    entry = description(measure(), device, memory, torch.cuda.device_count(), host_limit(), own)
    known = named_by(device)
    name = f"{known.name if known else device.lower().replace(' ', '-')}-here"
    text = yaml.safe_dump({name: entry}, sort_keys=False)
    args.output.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
