"""Import, merge, verify and load a generated model of 10 GB or more; peak memory and time of each, under a limit.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from parallel.axes.zero3 import FrozenShards, deepspeed_config
from parallel.errors import LongspanError
from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.paths import user_path
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.export.adapter_write import export_adapter
from pipeline.export.trained_model import TrainedModel
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.hashes import HASHES
from pipeline.hf.writer import SHARD_BYTES, check_space, write_safetensors_sharded
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import load_base
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.memory import GIB
from pipeline.planning.rope import plan_rope
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.storage.json_file import write_json
from pipeline.storage.safetensors import TensorFact
from pipeline.training.run_record import git_commit
from tools.support.bench_rows import append_rows
from tools.support.command_line import console_of
from tools.support.shapes import config_json, llama2

CONTEXT = 32768
TP = 8


def layers_for(gb: float) -> int:
    """Llama-2-7B's layers that make a bf16 checkpoint of at least `gb` billion bytes."""
    shape = llama2("7b")
    hidden, ffn = shape.hidden, shape.ffn
    return max(1, -(-int(gb * 1e9 - 4 * shape.vocab * hidden) // (2 * (4 * hidden * hidden + 3 * hidden * ffn))))


def generate(folder: Path, gb: float) -> None:
    """Write a base of random bf16 weights and a PEFT adapter with LoRA, embedding and norms."""
    base = folder / "base"
    base.mkdir(parents=True)
    write_json(base / "config.json", {**config_json(llama2("7b", layers_for(gb))), "torch_dtype": "bfloat16"})
    arch = read_arch(base)
    pool = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def values(name: str, shape: tuple[int, ...], shift: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16) + values("", shape, shift)
        # Cheap, and no two tensors alike: the pool, turned by another amount.
        return pool.roll(7919 * shift).repeat(-(-count // len(pool)))[:count].view(shape)

    shapes = hf_tensor_shapes(arch)
    order = {name: number for number, name in enumerate(shapes)}
    facts = {name: TensorFact(shape, torch.bfloat16) for name, shape in shapes.items()}
    check_space(folder, 3 * sum(fact.nbytes for fact in facts.values()))
    write_safetensors_sharded(base, facts, lambda name: values(name, shapes[name], order[name]))
    lora = LoraConfig()
    trained = {name: values(name, shape, 7).float() for name, shape in adapter_shapes(arch, lora).items()}
    trained |= {
        name: values(name, shape, order[name] + 1)
        for name, shape in shapes.items()
        if "norm" in name or "embed" in name
    }
    rope = plan_rope(arch, RopeSettings(), CONTEXT)
    model = TrainedModel(base, HfCheckpoint(base).base_hash(), arch, rope, CONTEXT, lora, trained, 1)
    export_adapter(model, folder / "adapter")


def load_rank(base: Path, world: int, rank: int, zero3: bool = False) -> dict[str, float]:
    """Be one of `world` ranks (fake process group) and load what it holds; bytes read and held, seconds of loading.

    Args:
        zero3: its share of every matrix, in host memory; otherwise its slices under TP `world`.
    """
    arch = read_arch(base)
    grid = plan_grid(world, 1 if zero3 else world, 1, 1)
    groups = make_groups(grid, RankEnv(rank=rank, world_size=world, local_rank=0), fake=world > 1)
    try:
        shards = FrozenShards(groups, True, deepspeed_config(torch.bfloat16, 1, 1, world)) if zero3 else None
        rope = plan_rope(arch, RopeSettings(), arch.max_positions)
        part = RankModel(arch, rope, LoraConfig(rank=0), groups, torch.bfloat16, "full", shards=shards)
        held = sum(p.numel() * p.element_size() for p in part.parameters())
        checkpoint = HfCheckpoint(base)
        began = time.perf_counter()
        load_base(part, checkpoint)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - began, "read": checkpoint.bytes_read, "held": held}
    finally:
        destroy_groups()


def child(what: str, folder: Path) -> None:
    """A step that is no command of its own."""
    if what == "generate":
        generate(folder, float((folder / "gb").read_text()))
    elif what == "idle":
        import transformers  # noqa: F401  the largest import of any step
    elif what == "load":
        found = load_rank(folder / "imported", TP, 3)
        print(json.dumps({"read_gib": found["read"] / GIB, "held_gib": found["held"] / GIB}))
    elif what == "verify":
        from pipeline.export.adapter_read import load_adapter
        from pipeline.export.verify import verify

        model = load_adapter(folder / "adapter", folder / "imported", CONTEXT)
        verify(replace(model, source=folder / "adapter"), folder / "merged", "merged", layerwise=True)


def measure(command: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Run a process; seconds, peak RssAnon and RSS in GiB, and what it printed.

    Raises:
        LongspanError: it failed.
    """

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=out, stderr=subprocess.STDOUT, preexec_fn=restrict
        )
        anon = whole = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            facts = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon", "VmHWM")))
            anon = max(anon, int(facts.get("RssAnon", "0").split()[0]))
            whole = max(whole, int(facts.get("VmHWM", "0").split()[0]))
            time.sleep(0.01)
        code = process.wait()
        out.seek(0)
        output = out.read()
    if code:
        raise LongspanError(f"{' '.join(command)}: failed with status {code}: {output[-2000:]}")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "anon_gib": anon / (1 << 20), "rss_gib": whole / (1 << 20), "output": output}


def compare_hashes(one: Path, other: Path) -> int:
    """Number of tensors whose recorded hashes agree in two folders, which is all of them.

    Raises:
        LongspanError: one differs.
    """
    left, right = (json.loads((folder / HASHES).read_text())["tensors"] for folder in (one, other))
    if left != right:
        raise LongspanError(f"{other}: tensors differ from those of {one}; an import changed bits.")
    return len(left)


def largest(arch: LlamaArch) -> float:
    """GiB of the largest tensor in bf16."""
    return max(torch.Size(shape).numel() for shape in hf_tensor_shapes(arch).values()) * 2 / GIB


def run(folder: Path, gb: float) -> list[dict[str, Any]]:
    """All steps; one row each."""
    (folder / "gb").write_text(str(gb))
    base, imported, merged = (str(folder / name) for name in ("base", "imported", "merged"))
    limit = 2 * SHARD_BYTES + GIB
    here = "tools.bench.convert"
    convert = ["tools.merge_lora", "--adapter", str(folder / "adapter"), "--base", imported, "--output", merged]
    steps: list[tuple[str, list[str], int | None]] = [
        ("idle (imports only)", [here, "--child", "idle", "--folder", str(folder)], None),
        ("generate", [here, "--child", "generate", "--folder", str(folder)], None),
        ("import", ["tools.import_hf", base, imported], limit),
        ("merge", [*convert, "--no-verify"], limit),
        ("verify, layer by layer", [here, "--child", "verify", "--folder", str(folder)], limit),
        (f"load rank 3 of TP {TP}", [here, "--child", "load", "--folder", str(folder)], None),
    ]
    rows = []
    for name, words, bound in steps:
        row = {"step": name, "limit_gib": bound / GIB if bound else None, **measure(words, bound)}
        if name == "import":
            row["output"] = f"{compare_hashes(folder / 'base', folder / 'imported')} tensors bit-equal"
        elif name.startswith("verify"):
            report = json.loads((folder / "merged/verify.json").read_text())
            row["output"] = json.dumps(
                {key: report[key] for key in ("mode", "passed", "tensors", "max_abs_logit_difference")}
            )
        elif name.startswith("load"):
            row["output"] = row["output"].strip().splitlines()[-1]
        else:
            row["output"] = ""
        rows.append(row)
    return rows


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Generate, run, print; returns the exit status."""
    parser = Parser("tools.bench.convert", __doc__, "BENCHES.md")
    parser.add_argument(
        "--gb", type=float, default=10.0, help="size of the base, 10^9 bytes (default 10); needs 3 times"
    )
    parser.add_argument("--folder", type=user_path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=user_path, help="also append the rows here, one line each")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child, args.folder)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
    try:
        rows = run(folder, args.gb)
        size = sum(fact.nbytes for fact in HfCheckpoint(folder / "base").facts.values())
        arch = read_arch(folder / "base")
    except LongspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(title=f"{size / 1e9:.1f} GB in bf16, {arch.layers} layers, commit {git_commit()}")
    for column in ("step", "seconds", "peak RssAnon GiB", "peak RSS GiB", "limit GiB", "what"):
        table.add_column(column)
    for row in rows:
        limit = "" if row["limit_gib"] is None else f"{row['limit_gib']:.2f}"
        table.add_row(
            row["step"],
            f"{row['seconds']:.1f}",
            f"{row['anon_gib']:.2f}",
            f"{row['rss_gib']:.2f}",
            limit,
            row["output"],
        )
    console = console_of(200)
    console.print(table)
    idle, ratio = rows[0]["anon_gib"], largest(llama2("70b")) / largest(arch)
    for row in rows[2:4]:
        peak, hours = idle + (row["anon_gib"] - idle) * ratio, row["seconds"] * 138e9 / size / 3600
        console.print(
            f"Llama-2-70B, 138 GB, by formula (idle + the rest times {ratio:.2f}, the ratio of largest tensors): "
            f"{row['step']} {peak:.2f} GiB, {hours:.2f} h; bound 2 shards + 1 GiB = {(2 * SHARD_BYTES + GIB) / GIB:.2f}"
        )
    append_rows(args.json, rows, bytes=size, commit=git_commit())
    return 0


if __name__ == "__main__":
    sys.exit(main())
