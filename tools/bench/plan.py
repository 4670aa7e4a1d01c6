"""Hold the planner against measured steps: `longspan bench plan --json FILE` on a GPU, `--check` anywhere.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.table import Table

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv
from pipeline.config.paths import user_path
from pipeline.config.run import RunConfig
from pipeline.hf.weight_source import WeightSource
from pipeline.planner.footprint import footprint
from pipeline.planner.gpus import named_by
from pipeline.planner.layer_time import FITTED
from pipeline.planning.arch import LlamaArch
from pipeline.planning.memory import GIB
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import plan_run
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.command_line import console_of
from tools.support.plan_fit import fit, left_out
from tools.support.plan_points import MEASURED, POINTS, Point, misses, read_points, summary
from tools.support.scratch import scratch, written_once
from tools.support.shapes import config_json

ESTIMATED = "h200"
MADE_S, DRAWN = 6.0, 1.05 * GIB
"""Seconds to make a model and begin; bytes a second that random weights reach page-locked host memory: docs/LOG.md."""
GRID = Path(__file__).with_name("plan_grid.yaml")
HOST = "host GiB (resident)"
READ = {"seconds a step": "seconds", "peak GiB allocated": "allocated", "peak GiB reserved": "reserved", HOST: "host"}
"""What a dry run prints, by the names of MEASURED."""


def extended(few: dict[str, float], many: dict[str, float], layers: tuple[int, int], wanted: int) -> dict[str, float]:
    """Quantities of `wanted` layers from those of two smaller numbers: a straight line.

    But what the allocator holds beyond what is allocated does not grow with layers: that of the larger number is added.
    """
    first, second = layers
    if first == second:
        return few
    found = {what: few[what] + (many[what] - few[what]) * (wanted - first) / (second - first) for what in few}
    if "reserved" in found:
        found["reserved"] = found["allocated"] + many["reserved"] - many["allocated"]
    return found


def _write_config(folder: Path, arch: LlamaArch) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(arch)))


def resident() -> float:
    """GiB of host memory that this process holds."""
    return psutil.Process().memory_info().rss / GIB


@cache
def bare() -> float:
    """`resident` of a process that trains nothing yet: called before the first point is measured."""
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # makes the context
    return resident()


def measure_once(point: Point, layers: int, env: RankEnv, steps: int) -> dict[str, float]:
    """A step of the point with fewer layers, on this machine's device, by the names of MEASURED."""
    from parallel.world.groups import destroy_groups  # torch: --check needs none of it
    from tools.dry_run import measure, prepare

    small = dataclasses.replace(point, layers=layers).plan()
    # A process of its own would take as much as one of many points does beyond the points before it.
    process, before = bare(), resident()
    with scratch(env, "plan") as folder:

        def stand_in(write: bool) -> tuple[RunConfig, WeightSource | None, list[str]]:
            if write:
                _write_config(folder / "base", small.arch)
            model = dataclasses.replace(small.config.model, path=str(folder / "base"))
            return prepare(dataclasses.replace(small.config, model=model), folder, point.ranks, steps + 1, write)

        changed, base, _ = written_once(env, folder, stand_in)
        plan = plan_run(changed, point.ranks)
        if not env.launched:
            rank = plan.busiest_rank() if point.rank is None else point.rank
            env = dataclasses.replace(env, rank=rank, world_size=point.ranks)
        try:
            found = measure(plan, base, env, warmup=1)
        finally:
            destroy_groups()
            release()
    found[HOST] += process - before
    if RecomputePolicy.HOST in plan.recompute:
        del found[HOST]  # what is parked stays with the process, for the next point
    return {READ[key]: float(value) for key, value in found.items() if key in READ}


def release() -> None:
    """Give the GPU's memory back before the next point."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read_grid(file: Path, ranks: int | None) -> list[tuple[Point, tuple[int, int]]]:
    """Points to measure and their numbers of layers, twice the same where all are measured.

    Args:
        ranks: of torchrun: the real points of as many; None: those that one GPU stands in for.
    """
    found = []
    for entry in yaml.safe_load(file.read_text(encoding="utf-8")):
        layers = entry.pop("layers")
        first, second = layers[0], layers[-1]
        real = entry.pop("real", False)
        if real == (ranks is not None) and (ranks is None or entry["ranks"] == ranks):
            found.append((Point(**entry, use="held", alone=not real), (first, second)))
    return found


def measured(point: Point, layers: tuple[int, int], env: RankEnv, steps: int, gpu: str) -> dict[str, Any]:
    """A point as points.yaml has it, with what was measured of both numbers of layers."""
    both = [measure_once(point, number, env, steps) for number in dict.fromkeys(layers)]
    whole = extended(both[0], both[-1], layers, point.plan().arch.layers)
    entry = {key: value for key, value in dataclasses.asdict(point).items() if value is not None}
    return entry | {name: round(value, 4) for name, value in whole.items()} | {"gpu": gpu, "source": "tools.bench.plan"}


def measure_all(args: argparse.Namespace, env: RankEnv) -> int:
    """Measure until the time is up; points are appended to the file as they come."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("longspan bench plan: PyTorch sees no GPU to measure on; --check compares what was measured.")
    known = named_by(torch.cuda.get_device_name())
    if known is None:
        raise ConfigError(f"longspan bench plan: {torch.cuda.get_device_name()} is not in pipeline/planner/gpus.yaml.")
    began, left = time.monotonic(), []
    for point, layers in wanted(args, env.world_size if env.launched else None):
        # Ranks have clocks of their own, and would part company.
        if not env.launched and time.monotonic() - began > args.seconds:
            left.append(point.name)
            continue
        at = time.monotonic()
        entry = measured(point, layers, env, args.steps, known.name)
        if not env.is_main and env.launched:
            continue
        print(f"{point.name}: {entry['seconds']:.3f} s a step ({time.monotonic() - at:.1f} s)", flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write("- " + json.dumps(entry) + "\n")
    if left:
        print(f"not measured, {args.seconds} s were over: {', '.join(left)}")
    return 0


def wanted(args: argparse.Namespace, ranks: int | None) -> list[tuple[Point, tuple[int, int]]]:
    """`read_grid` less what --only leaves out and what --json has already.

    Args:
        ranks: as in `read_grid`.
    """
    done = {point.name for point in read_points(args.json)} if args.json and args.json.is_file() else set()
    chosen = args.only or [""]
    return [
        (point, layers)
        for point, layers in read_grid(GRID, ranks)
        if point.name not in done and any(word in point.name for word in chosen)
    ]


def seconds_to_measure(point: Point, layers: tuple[int, int], steps: int) -> float:
    """About how long `measured` takes on an H200: models are made and weights drawn, one step is not timed."""
    total = 0.0
    for number in dict.fromkeys(layers):
        small = dataclasses.replace(point, layers=number, gpu=ESTIMATED)
        away = footprint(small.plan(), 1).pinned
        total += MADE_S + away / DRAWN + (steps + 1) * small.predicted()["seconds"]
    return total


def estimate(args: argparse.Namespace) -> int:
    """Print what is left to measure and how long it takes."""
    for ranks in (None, 2):
        left = [(point, seconds_to_measure(point, layers, args.steps)) for point, layers in wanted(args, ranks)]
        for point, seconds in left:
            print(f"{seconds:6.0f} s  {point.name}")
        if left:
            minutes = sum(seconds for _, seconds in left) / 60
            gpus = "one GPU" if ranks is None else f"{ranks} GPUs under torchrun"
            print(f"{len(left)} points on {gpus}: about {minutes:.1f} minutes")
    print("In parts: --json FILE --seconds S begins no point after S seconds; the same again leaves out what FILE has.")
    return 0


def check(file: Path) -> int:
    """Print what the planner says beside what was measured."""
    found = misses(read_points(file))
    table = Table(title=f"The planner against {file}", title_justify="left")
    for column in ("point", "use", "what", "measured", "planned", "off by"):
        table.add_column(column, justify="left" if column in ("point", "use", "what") else "right")
    for miss in found:
        cells = (f"{miss.measured:.3f}", f"{miss.predicted:.3f}", f"{miss.relative:+.1%}")
        table.add_row(miss.point.name, miss.point.use, miss.what, *cells)
    console = console_of(140, highlight=False, soft_wrap=True)
    console.print(table)
    for what in MEASURED:
        for use in ("fit", "held", None):
            median, worst, number = summary(found, what, use)
            if number:
                name = {"fit": "fitted to", "held": "only predicted", None: "all"}[use]
                console.print(f"{what}, {name}: {number} points, median {median:.1%}, worst {worst:.1%}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.bench.plan", __doc__, "BENCHES.md")
    parser.add_argument("--check", type=user_path, nargs="?", const=POINTS, help="a file of points (default: shipped)")
    parser.add_argument("--fit", type=user_path, nargs="?", const=POINTS, help="the constants that suit a file best")
    parser.add_argument("--leave-out", action="store_true", help="with --fit: each fitted point by the others alone")
    parser.add_argument("--json", type=user_path, help="append each measured point here; --check reads it")
    parser.add_argument("--estimate", action="store_true", help="what is left to measure, and how long it takes")
    parser.add_argument("--seconds", type=float, default=320, help="begin no point after so many (default 320)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="points with one of these words in their name")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence."""
    args = parse(argv)
    if args.check is not None:
        return check(args.check)
    if args.fit is not None:
        for name, value in dataclasses.asdict(fit(read_points(args.fit))).items():
            print(f"{name}: {value:.4g} (now {getattr(FITTED, name):.4g})")
        if args.leave_out:
            for point, off in left_out(read_points(args.fit)):
                print(f"{point.name}: {off:+.1%} by constants of the other points")
        return 0
    return estimate(args) if args.estimate else measure_all(args, RankEnv.read())


if __name__ == "__main__":
    sys.exit(main())
