"""Time whole optimizer steps of one rank on one GPU, with random weights and tokens made in place.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from parallel.errors import ConfigError, LongspanError
from parallel.world.groups import Groups, destroy_groups, make_groups
from parallel.world.lone_rank import numbers_bytes
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.build import build_model
from pipeline.config.paths import user_path
from pipeline.config.sections import BASES, FAMILIES, RECOMPUTE
from pipeline.config.yaml_file import load_config
from pipeline.model.weights.load import mark_trainable
from pipeline.planning import tile_size
from pipeline.planning.memory import CUDA_CONTEXT, GIB
from pipeline.planning.run_plan import RunPlan
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.reporting.profile import print_profile
from tools.support.bench_rows import append_rows, print_rows
from tools.support.command_line import add_integers
from tools.support.gpu_cap import cap_memory, room_within
from tools.support.live_memory import print_live
from tools.support.random_base import RandomBase
from tools.support.shapes import KNOWN, shape_of
from tools.support.timed_step import TimedStep

MODELS = {f"llama{3 if size == '8b' else 2}-{size}": size for size in KNOWN}


@dataclass(frozen=True)
class Variant:
    """One model to measure."""

    family: str
    settings: tuple[str, ...] = ()
    """Of a run's YAML, beyond those of the command line."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        return ", ".join((*(() if self.family == "local" and self.settings else (self.family,)), *self.settings))


def settings_of(args: argparse.Namespace) -> list[str]:
    """The command line as settings of a run's YAML: LoRA r 8 on q, k, v, o, embedding and norms train by default."""
    settings = [
        f"data.sequence={args.sequence}",
        f"train.recompute={args.recompute}",
        f"train.micro_batch={args.micro_batch}",
        f"parallel.tp={args.tp}",
        f"parallel.cp={args.cp}",
        f"parallel.engine={args.engine}",
        f"attention.kind={args.attention}",
        f"attention.backend={args.backend}",
        f"model.base={args.base}",
    ]
    if args.group:
        settings.append(f"attention.group_size={args.group}")
    if args.offload:
        settings.append("parallel.offload.params=cpu")
    return [*settings, *args.set]


def plan_of(args: argparse.Namespace, variant: Variant, world: int) -> RunPlan:
    """The plan of the run that a variant is a step of.

    Raises:
        ConfigError: the settings or the ranks do not fit.
    """
    arch = shape_of(MODELS[args.model], args.layers)
    tree = {
        "model": {
            "path": "random",
            "context": max(args.sequence, arch.max_positions),
            "dtype": "bf16",
            "rope": {"type": "linear"},
        },
        "data": {"path": "random"},
        "train": {"steps": 1},
        "output": "nowhere",
    }
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder:
        path = Path(folder) / "bench.yaml"
        path.write_text(yaml.safe_dump(tree))
        config = load_config(path, [*settings_of(args), f"model.family={variant.family}", *variant.settings])
    if config.parallel.pp > 1:
        raise ConfigError("parallel.pp: one rank of a pipeline waits for others; measure it with longspan dry-run.")
    shared = config.parallel.tp * config.parallel.cp
    batch = config.train.micro_batch * args.micro_batches * max(1, world // shared)
    config = replace(config, train=replace(config.train, global_batch=batch))
    return RunPlan.shaped(config, arch, world, room_within(args.cap_gib))


def stepper(
    args: argparse.Namespace, plan: RunPlan, groups: Groups
) -> tuple[Callable[[int], float], Callable[[], None]]:
    """What takes an optimizer step and returns its seconds, and what gives page-locked memory back.

    Its errors: LongspanError where gradients were not finite, as arithmetic on NaN and zeros is faster than on numbers.
    """
    config = plan.config
    model = build_model(plan, config.lora, groups, RandomBase(plan.arch)).train()
    mark_trainable(model, config.train.trainable)
    steps = TimedStep(model, groups, config.parallel.offload.optimizer == "cpu")
    shape = config.train.micro_batch, config.sequence

    def take(step: int) -> float:
        return steps.take(*shape, args.micro_batches, plan.attention, step)

    return take, model.close


def measure(args: argparse.Namespace, plan: RunPlan, groups: Groups, take: Callable[[int], float]) -> dict[str, Any]:
    """Step times and peaks of one rank."""
    torch.cuda.empty_cache()
    for step in range(args.warmup):
        take(step)
    torch.cuda.reset_peak_memory_stats()
    times = [take(args.warmup + step) for step in range(args.steps)]
    peaks = torch.cuda.max_memory_allocated() - numbers_bytes(), torch.cuda.max_memory_reserved()
    if args.profile:
        print_profile(lambda: take(args.warmup + args.steps), groups.is_main or not groups.env.launched)
    if args.live:
        print_live(lambda: take(args.warmup + args.steps + 1), groups.is_main or not groups.env.launched)
    seconds = statistics.median(times)
    grid = plan.grid
    tokens_a_step = plan.sequence * plan.config.train.micro_batch * args.micro_batches
    formula = plan.memory().gpu_total - CUDA_CONTEXT
    return {
        "rank": groups.env.rank,
        "seconds": seconds,
        "spread": max(times) - min(times),
        "tokens_per_second_per_gpu": tokens_a_step / seconds / (grid.tp * grid.cp * grid.pp),
        "peak_allocated_gib": peaks[0] / GIB,
        "peak_reserved_gib": peaks[1] / GIB,
        "formula_gib": formula / GIB,
        "off": f"{peaks[0] / formula - 1:+.1%}",
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "recompute": " ".join(f"{policy.value}:{count}" for policy, count in Counter(plan.recompute).items()),
    }


def variants_of(args: argparse.Namespace) -> Iterator[Variant]:
    """Families first: ours and megatron's are compared under one set of settings."""
    for family in args.family:
        for settings in args.variant or [""]:
            yield Variant(family, tuple(settings.split()))


def measure_all(args: argparse.Namespace, env: RankEnv, world: int) -> list[dict[str, Any]]:
    """`measure` for each variant, and for each size of tiles where a family has tiles; one model at a time."""
    least, enough = tile_size.LEAST_TOKENS, tile_size.TILE_ELEMENTS
    rows: list[dict[str, Any]] = []
    alone = not env.launched
    for variant in variants_of(args):
        plan = plan_of(args, variant, world)
        if alone:
            env = RankEnv(rank=plan.busiest_rank() if args.rank is None else args.rank, world_size=world, local_rank=0)
        groups = make_groups(plan.grid, env, fake=alone and world > 1)
        seed_everything(0)
        take, close = stepper(args, plan, groups)
        for scale in args.tile_scale if variant.family == "local" else [1.0]:
            tile_size.LEAST_TOKENS, tile_size.TILE_ELEMENTS = int(least * scale), int(enough * scale)
            name = variant.name if scale == 1 else f"{variant.name}, tiles x {scale:g}"
            rows.append({"variant": name, **measure(args, plan, groups, take)})
        tile_size.LEAST_TOKENS, tile_size.TILE_ELEMENTS = least, enough
        close()
        del take, close
        gc.collect()
        destroy_groups(keep_world=not alone)
    return rows


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Command line."""
    parser = Parser("tools.bench.step", __doc__, "BENCHES.md")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama2-70b", help="shape (default llama2-70b)")
    parser.add_argument("--layers", type=int, help="layers, to fit a smaller card (default: the model's)")
    parser.add_argument("--sequence", type=int, default=32768, help="tokens a sequence (default 32768)")
    parser.add_argument("--attention", choices=("s2", "full"), default="s2")
    parser.add_argument("--group", type=int, help="S² group, tokens (default: a quarter of the sequence)")
    parser.add_argument("--backend", default="auto", help="attention backend (default auto)")
    parser.add_argument(
        "--tile-scale", type=float, nargs="+", default=[1.0], help="tiles this many times the product's (default 1)"
    )
    parser.add_argument("--base", choices=BASES, default="bf16", help="form of the frozen matrices (default bf16)")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="full")
    parser.add_argument("--engine", choices=("megatron", "zero3"), default="megatron")
    parser.add_argument("--offload", action="store_true", help="frozen weights in host memory (engine zero3)")
    add_integers(
        parser,
        ("--tp", 1, "tensor-parallel ranks"),
        ("--cp", 1, "context-parallel ranks"),
        ("--micro-batch", 1, "sequences a forward pass"),
        ("--micro-batches", 1, "forward passes a step"),
        ("--warmup", 2, "steps before timing"),
        ("--steps", 3, "timed steps"),
    )
    parser.add_argument(
        "--family", nargs="+", choices=FAMILIES, default=["local"], help="whose layers (default local: ours)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting for all; repeatable")
    parser.add_argument("--variant", action="append", metavar="'a.b=c d.e=f'", help="settings of one row; repeatable")
    parser.add_argument("--cap-gib", type=float, help="let the GPU have no more memory than this")
    parser.add_argument("--rank", type=int, help="which rank to be, when alone (default: the one with the most work)")
    parser.add_argument("--profile", action="store_true", help="also print which kernels one more step's time goes to")
    parser.add_argument("--live", action="store_true", help="also print what is on the GPU at one more step's peak")
    parser.add_argument("--json", type=user_path, help="also append the numbers here, one line a run")
    return parser, parser.parse_args(arguments)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table on rank 0."""
    parser, args = parse(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "This benchmark needs a CUDA device; none was found.\n")
    try:
        env = RankEnv.read()
        cap_memory(args.cap_gib, env.local_rank)
        world = env.world_size if env.launched else args.tp * args.cp
        rows = measure_all(args, env, world)
    except LongspanError as error:
        parser.exit(2, f"{error}\n")
    finally:
        destroy_groups()
    if env.launched and not env.is_main:
        return 0
    what = f"{args.model}" + (f", {args.layers} layers" if args.layers else "")
    title = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {what}, {args.sequence} tokens, {args.attention}, "
        f"{args.engine}, tp {args.tp} cp {args.cp}, " + ("NCCL" if env.launched else "fake process group")
    )
    print_rows(rows, title, 200)
    append_rows(args.json, rows, title=title, **vars(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
