"""Time optimizer steps of streamed sequences of several lengths on one GPU, beside the unstreamed step, in one call.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from parallel.axes.zero3 import FrozenShards, deepspeed_config
from parallel.errors import ConfigError
from parallel.world.grid import check_model_fits, plan_grid
from parallel.world.groups import Groups, destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.config.parallel import OffloadConfig, ParallelConfig
from pipeline.config.paths import user_path
from pipeline.config.rope import RopeSettings
from pipeline.config.run import RunConfig
from pipeline.config.sections import (
    GATE_UP,
    RECOMPUTE,
    WITHOUT,
    AttentionConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
)
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import init_adapters, mark_trainable
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.memory import GIB
from pipeline.planning.recompute import RecomputePolicy, policy_of
from pipeline.planning.rope import plan_rope
from pipeline.planning.run_plan import RunPlan
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.reporting.profile import print_profile
from tools.bench.peers import PEERS, apart
from tools.support.bench_rows import append_rows, print_rows
from tools.support.command_line import add_integers
from tools.support.gpu_cap import cap_memory, room_within
from tools.support.shapes import SIZES, shape_of
from tools.support.timed_step import TimedStep

MODELS = {"llama3-8b": "8b", **{f"llama2-{size}": size for size in SIZES}}
KINDS = ("lora", "embed", "norm")


def fill(model: RankModel) -> None:
    """Random weights, wherever they are kept."""
    with torch.no_grad():
        for name, parameter in model.canonical_parameters():
            if name.endswith("layernorm.weight"):
                parameter.fill_(1.0)
            elif ".adapters." not in name and not model.is_sharded(parameter):
                parameter.normal_(0.0, 0.02)
        if model.shards is not None:
            # Made on the GPU: in host memory random numbers would take minutes.
            noise = torch.randn(1 << 26, device=model.groups.device, dtype=model.dtype) * 0.02
            for _, stored in model.shards.shares():
                share = stored.view(model.dtype)
                for start in range(0, share.numel(), noise.numel()):
                    part = share[start : start + noise.numel()]
                    part.copy_(noise[: part.numel()])
    init_adapters(model, 0)
    mark_trainable(model, KINDS)


def policies_of(
    args: argparse.Namespace, arch: LlamaArch, groups: Groups, recompute: str, stream: int | None
) -> Sequence[RecomputePolicy]:
    """Of every layer: one word for all, or what a run's `recompute: auto` chooses for chunks of `stream` tokens."""
    if recompute != "auto":
        return [policy_of(recompute, args.gate_up)] * arch.layers
    grid = groups.plan
    longest = max(args.lengths)
    offload = OffloadConfig(params="cpu" if args.offload else "none")
    config = RunConfig(
        ModelConfig("random", longest),
        DataConfig("random"),
        TrainConfig(steps=1, recompute=recompute, gate_up=args.gate_up, gpu_gib=args.gpu_gib, stream=stream),
        "nowhere",
        attention=AttentionConfig("s2", group_size=args.group),
        parallel=ParallelConfig(
            tp=grid.tp, cp=grid.cp, engine="zero3" if args.offload else "megatron", offload=offload
        ),
    )
    return RunPlan.shaped(config, arch, groups.env.world_size, room_within(args.cap_gib)).recompute


class Trainee:
    """A model with its optimizer.

    Args:
        recompute: word for every layer.
        stream: tokens of a chunk; None: whole sequences.
    """

    def __init__(self, args: argparse.Namespace, groups: Groups, recompute: str, stream: int | None) -> None:
        arch = shape_of(MODELS[args.model], args.layers)
        longest = max(*args.lengths, args.reference, arch.max_positions)
        shards = None
        if args.offload:
            plan = groups.plan
            described = deepspeed_config(torch.bfloat16, 1, args.micro_batches, plan.dp * plan.cp)
            shards = FrozenShards(groups, True, described, OffloadConfig().ahead)
        self.model = RankModel(
            arch,
            plan_rope(arch, RopeSettings(type="linear"), longest),
            LoraConfig(),
            groups,
            torch.bfloat16,
            policies_of(args, arch, groups, recompute, stream),
            shards=shards,
            kinds=KINDS,
            without=args.without,
            stream=stream,
        )
        fill(self.model)
        self.steps = TimedStep(self.model, groups)
        self.spec = AttentionSpec("s2", args.group, backend=args.backend)
        self.micro_batches = args.micro_batches
        self.model.train()

    def step(self, length: int, seed: int) -> float:
        """Seconds of an optimizer step on sequences of `length` tokens.

        Raises:
            LongspanError: see `TimedStep.take`.
        """
        if self.model.stream is not None:
            self.model.stream.reserve(1, length, self.spec)  # once a length: not a step's time
        return self.steps.take(1, length, self.micro_batches, self.spec, seed)

    def measure(self, length: int, steps: int, ranks: int) -> dict[str, Any]:
        """Time and peaks of `steps` steps; the fastest counts."""
        torch.cuda.reset_peak_memory_stats()
        seconds = min(self.step(length, number) for number in range(steps))
        parked = 0 if self.model.stream is None else self.model.stream.parked.host_bytes
        return {
            "tokens": length,
            "seconds": seconds,
            "tokens/s a GPU": length * self.micro_batches / seconds / ranks,
            "peak allocated GiB": torch.cuda.max_memory_allocated() / GIB,
            "peak reserved GiB": torch.cuda.max_memory_reserved() / GIB,
            "parked GiB": parked / GIB,
        }


def measure_peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """transformers + PEFT at the shortest length and at each next one, until one fails: its memory is the end."""
    rows = list[dict[str, Any]]()
    for kind in args.peers:
        for length in sorted(args.peer_lengths or args.lengths):
            asked = argparse.Namespace(
                model=args.model, layers=args.layers, sequence=length, warmup=1, steps=args.steps, cap_gib=args.cap_gib
            )
            found = apart(kind, asked)
            row: dict[str, Any] = {"what": f"transformers + PEFT, {kind}", "tokens": length}
            if "failed" in found:
                rows.append({**row, "failed": found["failed"][:200]})
                break
            row |= {"seconds": found["seconds"], "tokens/s a GPU": found["tokens_per_second"]}
            rows.append({**row, "peak allocated GiB": found["peak_gib"]})
    return rows


def measure_all(args: argparse.Namespace, groups: Groups) -> list[dict[str, Any]]:
    """The unstreamed step, then every length streamed, the shortest first."""
    rows: list[dict[str, Any]] = []
    ranks = groups.plan.tp * groups.plan.cp
    if args.reference:
        trainee = Trainee(args, groups, "full", None)
        trainee.step(args.reference, 1000)  # kernels are chosen and memory is found
        rows.append({"what": "whole, full recompute", **trainee.measure(args.reference, args.reference_steps, ranks)})
        trainee.model.close()
        del trainee
        gc.collect()
        torch.cuda.empty_cache()
    trainee = Trainee(args, groups, args.recompute, args.chunk)
    trainee.step(2 * args.chunk, 1000)
    for length in sorted(args.lengths):
        rows.append({"what": f"chunks of {args.chunk}", **trainee.measure(length, args.steps, ranks)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # a longer one may run out of time
    if args.profile:
        print_profile(lambda: trainee.step(4 * args.chunk, 2000), True)
    trainee.model.close()
    for row in rows:
        row["against the first"] = row["tokens/s a GPU"] / rows[0]["tokens/s a GPU"]
    return rows


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table."""
    parser = Parser("tools.bench.stream", __doc__, "BENCHES.md")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3-8b", help="shape (default llama3-8b)")
    parser.add_argument("--layers", type=int, help="layers, to fit a smaller card (default: the model's)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[65536, 262144, 1048576], help="tokens of a streamed sequence"
    )
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="pointwise",
        help="within a chunk (default pointwise)",
    )
    parser.add_argument(
        "--gate-up", choices=GATE_UP, default="gpu", help="where pointwise keeps gate and up (default gpu)"
    )
    parser.add_argument("--without", nargs="*", choices=WITHOUT, default=[], metavar="W", help="words of train.without")
    parser.add_argument("--gpu-gib", type=float, help="memory that auto fills (default: the GPU's, or the cap)")
    parser.add_argument("--backend", default="auto", help="attention backend (default auto)")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=[],
        metavar="P",
        help="transformers + PEFT too: sdpa, s2, s2-liger..",
    )
    parser.add_argument("--peer-lengths", type=int, nargs="+", help="tokens of theirs (default: --lengths)")
    parser.add_argument("--cap-gib", type=float, help="let the GPU have no more memory than this")
    parser.add_argument("--offload", action="store_true", help="frozen weights in host memory (engine zero3)")
    add_integers(
        parser,
        ("--chunk", 16384, "tokens at work at once"),
        ("--group", 8192, "S² group, tokens"),
        ("--reference-steps", 3, "timed unstreamed steps"),
        ("--steps", 1, "timed steps a length, of which the fastest counts"),
        ("--micro-batches", 1, "sequences a step"),
        ("--tp", 1, "tensor-parallel ranks"),
        ("--cp", 1, "context-parallel ranks"),
    )
    parser.add_argument("--reference", type=int, default=32768, help="tokens of the unstreamed step; 0: none")
    parser.add_argument("--rank", type=int, default=0, help="which rank to be, when alone (default 0)")
    parser.add_argument("--profile", action="store_true", help="also print which kernels a step's time goes to")
    parser.add_argument("--json", type=user_path, help="also append the numbers here, one line a row")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "This benchmark needs a CUDA device; none was found.\n")
    if 2 * args.chunk < args.group or args.chunk % (args.tp * args.cp):
        raise ConfigError(f"--chunk: {args.chunk} is below half a group of {args.group}, or no multiple of tp x cp.")
    try:
        env = RankEnv.read()
        world = env.world_size if env.launched else args.tp * args.cp
        grid = plan_grid(world, args.tp, args.cp, 1)
        arch = shape_of(MODELS[args.model], args.layers)
        check_model_fits(grid, arch.heads, arch.kv_heads, arch.ffn)
        if not env.launched:
            env = RankEnv(rank=args.rank, world_size=world, local_rank=0)
        groups = make_groups(grid, env, fake=not env.launched and world > 1)
        seed_everything(0)
        theirs = measure_peers(args)
        cap_memory(args.cap_gib, env.local_rank)
        rows = theirs + measure_all(args, groups)
    finally:
        destroy_groups()
    if env.launched and not env.is_main:
        return 0
    shape = args.model + (f", {args.layers} layers" if args.layers else "") + (", offloaded" if args.offload else "")
    title = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape}, group {args.group}, recompute "
        f"{args.recompute} within a chunk, gate and up: {args.gate_up}, tp {args.tp} cp {args.cp}"
    )
    print_rows(rows, title, 160)
    append_rows(args.json, rows, title=title, **vars(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
