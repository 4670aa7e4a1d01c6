"""One rank's share of a run on this machine's one GPU, before a node is booked: `longspan dry-run --config X`

All layers, real data path, a few optimizer steps of one micro-batch each, under torch's fake process group: memory and
compute are those of one rank of `--nproc`, by default the one with the most work, for which the others would wait;
nothing is sent, losses mean nothing. A base model or text that is not on this
machine is stood in for by random weights of its shape and random tokens. Started by torchrun, all ranks are there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from parallel.errors import ConfigError
from parallel.world.groups import destroy_groups
from parallel.world.lone_rank import numbers_bytes
from parallel.world.rank_env import RankEnv
from pipeline.build import build
from pipeline.config.evaluation import EvalConfig
from pipeline.config.paths import user_path
from pipeline.config.run import RunConfig
from pipeline.config.sections import DataConfig, SaveConfig
from pipeline.config.yaml_file import load_config
from pipeline.hf.weight_source import WeightSource
from pipeline.planner.models import published_config
from pipeline.planning.arch import read_arch
from pipeline.planning.memory import CUDA_CONTEXT, GIB, PROCESS
from pipeline.planning.run_plan import RunPlan, plan_run
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number
from pipeline.reporting.profile import print_profile
from pipeline.training.planned import settled, this_device
from tools.support.gpu_cap import cap_memory
from tools.support.random_base import RandomBase
from tools.support.scratch import scratch, written_once
from tools.support.shapes import KNOWN, config_json, shape_of
from tools.support.tiny_checkpoint import write_tokenizer, write_tokens

IDS = {"bos_token_id": 1, "eos_token_id": 2}
"""Of the stand-in tokenizer."""
CPU_BYTES = 4 * GIB
"""The most a rank may need, in fp32, where there is no GPU."""


def _stand_in_model(path: Path, folder: Path) -> None:
    """Write config.json of the shape that a missing folder's name tells.

    Raises:
        ConfigError: it tells none.
    """
    values = published_config(path)
    size = next((size for size in KNOWN if size in path.name.lower()), None)
    if values is None and size is not None:
        values = config_json(shape_of(size))
    if values is None:
        raise ConfigError(
            f"model.path: {path} is not here and its name tells no known size ({', '.join(KNOWN)}); download its "
            "config.json at least."
        )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values | IDS))


def one_micro_batch(config: RunConfig, nproc: int) -> RunConfig:
    """The run with one micro-batch a rank and step; of a pipeline as many as it has stages."""
    parallel, micro = config.parallel, config.train.micro_batch
    replicas = max(1, nproc // (parallel.tp * parallel.cp * parallel.pp))
    return replace(config, train=replace(config.train, global_batch=micro * replicas * parallel.pp))


def prepare(
    config: RunConfig, folder: Path, nproc: int, steps: int, write: bool = True
) -> tuple[RunConfig, WeightSource | None, list[str]]:
    """The run to measure, its stand-in weights if the real ones are not here, and notes on what differs.

    Args:
        folder: of stand-ins.
        write: make them; otherwise they are there.
    """
    notes = ["one micro-batch a step: accumulation only adds more of the same"]
    changed = replace(
        one_micro_batch(config, nproc),
        eval=EvalConfig(),
        save=SaveConfig(every=0),
        output=str(folder / "run"),
        attention=replace(config.attention, full_last_steps=0),
    )
    changed = replace(changed, train=replace(changed.train, steps=steps, warmup_steps=0))
    base: WeightSource | None = None
    path = Path(config.model.path)
    weights = list(path.glob("*.safetensors")) if path.is_dir() else []
    if not weights:
        if not (path / "config.json").is_file():
            if write:
                _stand_in_model(path, folder / "base")
            path = folder / "base"
            changed = replace(changed, model=replace(config.model, path=str(path)))
        base = RandomBase(read_arch(path))
        notes.append(f"random weights stand in for {config.model.path}")
    sources = config.data.named_sources.values()
    if not all(Path(source).exists() for source in sources) or base is not None:
        if write:
            write_tokenizer(folder / "tokenizer.model")
        data = DataConfig(
            path=str(folder / "tokens"),
            sequence=config.data.sequence,
            tokenizer=str(folder / "tokenizer.model"),
            mask_documents=config.data.mask_documents,
        )
        changed = replace(changed, data=data)
        if write:
            write_tokens(changed)
        notes.append(f"random tokens stand in for {', '.join(sources)}")
    return changed, base, notes


def refuse_without_gpu(plan: RunPlan) -> None:
    """Let a CPU be a rank of tiny runs only: others would take this machine's memory, and hours.

    Raises:
        ConfigError: the run is not tiny; with what the formula says of it.
    """
    config = plan.config
    on_cpu = replace(plan, config=replace(config, model=replace(config.model, dtype="fp32"))).memory()
    need = on_cpu.gpu_total - CUDA_CONTEXT + sum(on_cpu.host.values()) - PROCESS
    if need > CPU_BYTES:
        found = plan.memory()
        raise ConfigError(
            f"PyTorch sees no GPU to measure on; by formula one of {plan.grid.world_size} ranks takes about "
            f"{found.gpu_total / GIB:.1f} GiB of its GPU and {sum(found.host.values()) / GIB:.1f} GiB of host memory; "
            "run this on a machine with one GPU, or try the same settings on a CPU: longspan tiny-run (a script: "
            "--tiny)."
        )


def measure(
    plan: RunPlan, base: WeightSource | None, env: RankEnv, warmup: int, profile: bool = False
) -> dict[str, Any]:
    """Take the steps; figures of this rank, which is alone unless torchrun started it.

    Raises:
        LongspanError: see `pipeline.build.build`.
    """
    cuda = torch.cuda.is_available()
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    began = time.perf_counter()
    config = plan.config
    run = build(plan, env, base=base, fake=env.world_size > 1 and not env.launched)
    trainer, shards = run.trainer, run.trainer.parts.model.shards
    loaded = time.perf_counter() - began
    rows, seconds = [], []
    try:
        for step in range(config.train.steps):
            if step == warmup and cuda:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            row = trainer.gradients(step)
            trainer.update(step, row)
            synchronize()
            rows.append(row)
            if step >= warmup:
                seconds.append(time.perf_counter() - began)
        if profile:
            print_profile(lambda: trainer.gradients(config.train.steps - 1), run.groups.is_main or not env.launched)
    finally:
        trainer.parts.loader.close()
        trainer.parts.saver.close()
    grid = plan.grid
    # As many micro-batches a step as pipeline stages: the stages cancel out.
    tokens = config.train.micro_batch * config.sequence / (grid.tp * grid.cp)
    median = statistics.median(seconds)
    policies = Counter(policy.value for policy in plan.recompute)
    found: dict[str, Any] = {
        "layers keep": ", ".join(f"{count} {policy}" for policy, count in policies.items()),
        "formula GiB": round((plan.memory().gpu_total - CUDA_CONTEXT) / GIB, 2),
        "seconds a step": round(median, 5),
        "tokens/s/GPU": round(tokens / median, 1),
        "skipped steps": rows[-1]["skipped"],
        "host GiB (resident)": round(psutil.Process().memory_info().rss / GIB, 2),
        "host GiB (peak)": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 2),
        "pinned GiB": round((shards.pinned_bytes if shards else 0) / GIB, 3),
        "loading seconds": round(loaded, 1),
    }
    if cuda:
        stats = torch.cuda.memory_stats()
        found |= {
            "peak GiB allocated": round((torch.cuda.max_memory_allocated() - numbers_bytes()) / GIB, 4),
            "peak GiB reserved": round(torch.cuda.max_memory_reserved() / GIB, 4),
            "allocator flushes": stats["num_alloc_retries"],
        }
    trainer.parts.model.close()
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.dry_run", __doc__, "LAUNCH.md")
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    parser.add_argument("--nproc", type=whole_number(), default=8, help="GPUs of the run to pretend (default 8)")
    parser.add_argument(
        "--rank", type=whole_number(0), help="which of them to be, from 0 (default: the one with the most work)"
    )
    parser.add_argument("--profile", action="store_true", help="also print which kernels one more step's time goes to")
    parser.add_argument(
        "--steps", type=whole_number(), default=3, help="measured steps, after one that warms up (default 3)"
    )
    parser.add_argument("--cap-gib", type=float, help="let the GPU have no more memory than this")
    parser.add_argument("--json", type=user_path, help="append the figures here, one line a run")
    args = parser.parse_args(argv)
    if args.rank is not None and args.rank >= args.nproc:
        parser.error(f"--rank: {args.rank} is not one of --nproc {args.nproc} ranks, which are numbered from 0.")
    return args


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence."""
    args = parse(argv)
    try:
        env = RankEnv.read()
        if not env.launched:
            env = RankEnv(rank=args.rank or 0, world_size=args.nproc)
        cap_memory(args.cap_gib, env.local_rank)
        config = load_config(args.config, args.set)
        with scratch(env, "dry-run") as folder:
            stand_in = partial(prepare, config, folder, env.world_size, args.steps + 1)
            changed, base, notes = written_once(env, folder, stand_in)
            # The one GPU stands in for all of a machine's.
            here = replace(this_device(env), here=env.world_size)
            if args.cap_gib:
                here = replace(here, memory=min(here.memory, int(args.cap_gib * GIB)))
            changed, chosen = settled(changed, env, here)
            if chosen:
                notes.append(chosen.rstrip("."))
                changed = one_micro_batch(changed, env.world_size)
            plan = plan_run(changed, env.world_size, here.memory if here.name else None)
            if not torch.cuda.is_available():
                refuse_without_gpu(plan)
            if args.rank is None and not env.launched:
                env = replace(env, rank=plan.busiest_rank())
            found = measure(plan, base, env, warmup=1, profile=args.profile)
    finally:
        destroy_groups()
    if env.launched and not env.is_main:
        return 0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    grid = plan.config.parallel
    title = (
        f"{args.config.stem}: rank {env.rank} of {env.world_size}, {grid.engine}, tp {grid.tp} cp {grid.cp}, {device}"
    )
    title += ", all there" if env.launched else ""
    table = Table(show_header=False)
    for key, value in found.items():
        table.add_row(key, f"{value:.3f}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(f"Note: {note}.", highlight=False)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps({"title": title, "set": args.set, "cap": args.cap_gib, **found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
