"""Time whole optimizer steps of one rank on one GPU, with random weights and tokens made in place.

    python -m tools.bench.step --model llama2-70b --sequence 32768 --tp 8 [--rank N] [--json FILE]
    torchrun --nproc-per-node 8 -m tools.bench.step --model llama2-70b --sequence 32768 --cp 8

Started alone, the process is one rank of tp x cp, by default the one with the most work, under torch's fake process
group: memory and compute are real, communication takes no time, and the losses mean nothing. Started by torchrun, all
is real. Tokens/s are per GPU: sequence tokens over the step's time over the ranks that share a sequence. Several
`--tile-scale` are measured in turn, in one process, for the size of tensor parallelism's tiles; so are several families
of layers: `--family local megatron` puts megatron-core's own beside ours.

Alone, neither family pays for what is sent (`parallel.world.lone_rank`). Ratios of real runs, over NCCL, say what a
user gets.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from parallel.errors import LongspanError
from parallel.world.grid import check_model_fits, plan_grid
from parallel.world.groups import Groups, destroy_groups, make_groups
from parallel.world.lone_rank import numbers_bytes
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.config.paths import user_path
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import RECOMPUTE, LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.rank_model import RankModel
from pipeline.model.spec import FAMILIES
from pipeline.model.weights.load import init_adapters, mark_trainable, trainable
from pipeline.planning import tile_size
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.balance import busiest_rank
from pipeline.planning.rope import plan_rope
from pipeline.reporting.command import command
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.reduction import GradientReduction
from tools.support.command_line import add_integers, console_of
from tools.support.profile import print_profile
from tools.support.shapes import SIZES, llama2

MODELS = {f"llama2-{size}": size for size in SIZES}


def build_part(args: argparse.Namespace, groups: Groups, family: str) -> RankModel:
    """The rank's part with random weights: LoRA r 8 on q, k, v, o, embedding and norms train."""
    arch = llama2(MODELS[args.model], args.layers)
    plan = groups.plan
    check_model_fits(plan, arch.heads, arch.kv_heads, arch.ffn)
    rope = plan_rope(arch, RopeSettings(type="linear"), max(args.sequence, arch.max_positions))
    model = RankModel(arch, rope, LoraConfig(), groups, torch.bfloat16, args.recompute, family=family)
    with torch.no_grad():
        for name, parameter in model.canonical_parameters():
            if name.endswith("layernorm.weight"):
                parameter.fill_(1.0)
            elif ".adapters." not in name:
                parameter.normal_(0.0, 0.02)
    init_adapters(model, 0)
    mark_trainable(model, ("lora", "embed", "norm"))
    return model


def attention_of(args: argparse.Namespace) -> AttentionSpec:
    """The attention asked for."""
    return AttentionSpec(args.attention, args.group or args.sequence // 4, backend=args.backend)


def stepper(args: argparse.Namespace, groups: Groups, family: str) -> Callable[[int], float]:
    """What takes an optimizer step and returns its seconds.

    Raises:
        LongspanError: gradients were not finite: arithmetic on NaN and zeros is faster than on numbers.
    """
    model = build_part(args, groups, family).train()
    named = ((name, "lora" if kind == "lora" else "other", parameter) for name, kind, parameter in trainable(model))
    optimizer = TrainableAdamW(named, group=groups.data)
    reduction = GradientReduction(groups, model)
    spec = attention_of(args)
    shape = (args.micro_batch, args.sequence)

    def take(step: int) -> float:
        # Different tokens each step: repeated ones could flatter caches.
        tokens = torch.randint(0, model.arch.vocab, shape, generator=torch.Generator().manual_seed(step))
        batches = [Batch(tokens, tokens, None)] * args.micro_batches
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad()
        model.train_step(batches, spec, 1 / tokens.numel(), optimizer.arm_reduce)
        reduction.finish(optimizer)
        norm = float(optimizer.grad_norm(reduction.squares))
        optimizer.step({"lora": 2e-5, "other": 2e-5}, norm)
        torch.cuda.synchronize()
        if not 0 < norm < math.inf:
            raise LongspanError(f"The gradient norm of step {step} is {norm}: its time says nothing about training.")
        return time.perf_counter() - began

    return take


def measure(args: argparse.Namespace, groups: Groups, take: Callable[[int], float]) -> dict[str, Any]:
    """Step times and peaks of one rank."""
    torch.cuda.empty_cache()
    for step in range(args.warmup):
        take(step)
    torch.cuda.reset_peak_memory_stats()
    times = [take(args.warmup + step) for step in range(args.steps)]
    peaks = torch.cuda.max_memory_allocated() - numbers_bytes(), torch.cuda.max_memory_reserved()
    if args.profile:
        print_profile(lambda: take(args.warmup + args.steps), groups.is_main or not groups.env.launched)
    seconds = statistics.median(times)
    plan = groups.plan
    tokens_a_step = args.sequence * args.micro_batch * args.micro_batches
    gib = 1 << 30
    return {
        "rank": groups.env.rank,
        "seconds": seconds,
        "spread": max(times) - min(times),
        "tokens_per_second_per_gpu": tokens_a_step / seconds / (plan.tp * plan.cp * plan.pp),
        "peak_allocated_gib": peaks[0] / gib,
        "peak_reserved_gib": peaks[1] / gib,
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def measure_all(args: argparse.Namespace, groups: Groups) -> list[dict[str, Any]]:
    """`measure` for each family, and for each size of tiles where the family has tiles; one model at a time."""
    least, enough = tile_size.LEAST_TOKENS, tile_size.TILE_ELEMENTS
    rows = []
    for family in args.family:
        take = stepper(args, groups, family)
        for scale in args.tile_scale if family == "local" else [1.0]:
            tile_size.LEAST_TOKENS, tile_size.TILE_ELEMENTS = int(least * scale), int(enough * scale)
            variant = f"{family}, tiles x {scale:g}" if family == "local" else family
            rows.append({"variant": variant, **measure(args, groups, take)})
        del take
        gc.collect()
    return rows


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the shape and grid, measure, print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama2-70b", help="shape (default llama2-70b)")
    parser.add_argument("--layers", type=int, help="layers, to fit a smaller card (default: the model's)")
    parser.add_argument("--sequence", type=int, default=32768, help="tokens a sequence (default 32768)")
    parser.add_argument("--attention", choices=("s2", "full"), default="s2")
    parser.add_argument("--group", type=int, help="S² group, tokens (default: a quarter of the sequence)")
    parser.add_argument("--backend", default="auto", help="attention backend (default auto)")
    parser.add_argument(
        "--tile-scale", type=float, nargs="+", default=[1.0], help="tiles this many times the product's (default 1)"
    )
    parser.add_argument("--recompute", choices=RECOMPUTE, default="full")
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
        "--family", nargs="+", choices=sorted(FAMILIES), default=["local"], help="whose layers (default local: ours)"
    )
    parser.add_argument("--rank", type=int, help="which rank to be, when alone (default: the one with the most work)")
    parser.add_argument("--profile", action="store_true", help="also print which kernels one more step's time goes to")
    parser.add_argument("--json", type=user_path, help="also append the numbers here, one line a run")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "This benchmark needs a CUDA device; none was found.\n")
    try:
        env = RankEnv.read()
        alone = not env.launched
        world = args.tp * args.cp if alone else env.world_size
        grid = plan_grid(world, args.tp, args.cp, 1)
        if alone:
            arch = llama2(MODELS[args.model], args.layers)
            check_model_fits(grid, arch.heads, arch.kv_heads, arch.ffn)
            busiest = busiest_rank(arch, args.sequence, attention_of(args), grid)
            env = RankEnv(rank=busiest if args.rank is None else args.rank, world_size=world, local_rank=0)
        groups = make_groups(grid, env, fake=alone and world > 1)
        seed_everything(0)
        rows = measure_all(args, groups)
    except LongspanError as error:
        parser.exit(2, f"{error}\n")
    finally:
        destroy_groups()
    if not env.is_main and not alone:
        return 0
    told = f"{args.model}" + (f", {args.layers} layers" if args.layers else "")
    title = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {told}, {args.sequence} tokens, {args.attention}, "
        f"tp {args.tp} cp {args.cp}, rank {env.rank}, recompute {args.recompute}, "
        + ("fake process group" if alone else "NCCL")
    )
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console_of(160).print(table)
    if args.json:
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        with args.json.open("a") as file:
            file.writelines(json.dumps({"title": title, **facts, **row}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
