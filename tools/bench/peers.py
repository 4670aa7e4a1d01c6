"""One GPU, one job: transformers + PEFT (+ Liger) as LongLoRA's users run them, and this product, in turn.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.paths import user_path
from pipeline.config.sections import RECOMPUTE
from pipeline.planning.memory import GIB
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.bench_rows import append_rows, print_rows
from tools.support.command_line import add_integers
from tools.support.gpu_cap import cap_memory
from tools.support.shapes import SIZES, config_json, shape_of

MODELS = {"llama3-8b": "8b", **{f"llama2-{size}": size for size in SIZES}}
PEERS = ("sdpa", "s2", "sdpa-liger", "s2-liger")


def published_s2(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """LongLoRA's llama_attn_replace as transformers calls attention: [B, H, S, D] -> [B, S, H, D].

    A group is a quarter of the sequence; the last half group wraps around to the front, as published.
    """
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    batch, heads, tokens, width = query.shape
    group = tokens // 4

    def shift(x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2).clone()
        x[:, :, heads // 2 :] = x[:, :, heads // 2 :].roll(-(group // 2), dims=1)
        return x.reshape(batch * tokens // group, group, heads, width).transpose(1, 2)

    out = torch.nn.functional.scaled_dot_product_attention(
        shift(query), shift(key), shift(value), is_causal=True, scale=scaling
    )
    out = out.transpose(1, 2).reshape(batch, tokens, heads, width).clone()
    out[:, :, heads // 2 :] = out[:, :, heads // 2 :].roll(group // 2, dims=1)
    return out, None


def run_peer(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of transformers + PEFT in this process."""
    import transformers
    from peft import LoraConfig, get_peft_model

    attention, _, liger = kind.partition("-")
    if attention == "s2":
        transformers.AttentionInterface.register("published_s2", published_s2)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    cap_memory(args.cap_gib, 0)
    arch = shape_of(MODELS[args.model], args.layers)
    described = config_json(arch) | {"max_position_embeddings": max(args.sequence, arch.max_positions)}
    config = transformers.LlamaConfig(**described)
    config._attn_implementation = "published_s2" if attention == "s2" else "sdpa"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "norm" in name:
            parameter.requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, fused=True)

    def take(step: int) -> float:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, arch.vocab, (1, args.sequence), generator=generator).cuda()
        torch.cuda.synchronize()
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for step in range(args.warmup):
        take(step)
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(take(args.warmup + step) for step in range(args.steps))
    return {
        "seconds": seconds,
        "tokens_per_second": args.sequence / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def run_ours(attention: str, settings: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """`tools.bench.step` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="longspan-peers-") as folder:
        path = Path(folder) / "rows.jsonl"
        command_line = [sys.executable, "-m", "tools.bench.step", "--model", args.model, "--json", str(path)]
        command_line += ["--sequence", str(args.sequence), "--attention", attention, "--warmup", str(args.warmup)]
        command_line += ["--steps", str(args.steps), *_optional(args)]
        for setting in settings:
            command_line += ["--set", setting]
        done = subprocess.run(command_line, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        row = json.loads(path.read_text().splitlines()[-1])
    found = {"seconds": row["seconds"], "tokens_per_second": row["tokens_per_second_per_gpu"]}
    return found | {"peak_gib": row["peak_allocated_gib"], "recompute": row["recompute"]}


def _optional(args: argparse.Namespace) -> list[str]:
    """Of a process of its own: options that are passed on where they were given."""
    given = {"--layers": args.layers, "--cap-gib": args.cap_gib}
    return [word for name, value in given.items() if value for word in (name, str(value))]


def apart(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """`run_peer` in a process of its own, of `args.model`, `layers`, `sequence`, `warmup`, `steps` and `cap_gib`."""
    if kind.endswith("liger") and importlib.util.find_spec("liger_kernel") is None:
        return {"failed": "liger_kernel is not installed"}
    words = [sys.executable, "-m", "tools.bench.peers", "--one", kind, "--model", args.model]
    words += ["--sequence", str(args.sequence), "--warmup", str(args.warmup), "--steps", str(args.steps)]
    done = subprocess.run(words + _optional(args), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row the speed of ours in the same attention over its own: of the first of ours, by the planner."""
    for row in rows:
        full = "full" in row["what"] or "sdpa" in row["what"]
        ours = next(one for one in rows if one["what"].startswith(f"Longspan, {'full' if full else 's2'}, auto"))
        if "tokens_per_second" in row and "tokens_per_second" in ours:
            row["ratio"] = ours["tokens_per_second"] / row["tokens_per_second"]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all, print a table."""
    parser = Parser("tools.bench.peers", __doc__, "BENCHES.md")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama2-7b", help="shape (default llama2-7b)")
    parser.add_argument("--layers", type=int, help="layers, to fit a smaller card (default: the model's)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="which (default: all)")
    parser.add_argument("--recompute", nargs="*", choices=RECOMPUTE, default=[], help="of ours, beside auto")
    parser.add_argument(
        "--gate-up", nargs="+", default=["gpu"], choices=("gpu", "fp8", "host"), help="of ours; ratios are to the first"
    )
    add_integers(
        parser,
        ("--sequence", 32768, "tokens a sequence"),
        ("--warmup", 2, "steps before timing"),
        ("--steps", 3, "timed steps"),
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of ours; repeatable")
    parser.add_argument("--cap-gib", type=float, help="let the GPU have no more memory than this")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=user_path, help="also append the numbers here, one line a row")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "This benchmark needs a CUDA device; none was found.\n")
    if args.one:
        print(json.dumps(run_peer(args.one, args)))
        return 0
    rows: list[dict[str, Any]] = [{"what": f"transformers + PEFT, {kind}", **apart(kind, args)} for kind in args.peers]
    for attention in ("s2", "full"):
        for where in args.gate_up:
            settings = ["train.recompute=auto", f"train.gate_up={where}", *args.set]
            name = f"Longspan, {attention}, auto" + ("" if where == "gpu" else f", gate and up {where}")
            rows.append({"what": name, **run_ours(attention, settings, args)})
        for word in args.recompute:
            name = f"Longspan, {attention}, {word}"
            rows.append({"what": name, **run_ours(attention, [f"train.recompute={word}", *args.set], args)})
    add_ratios(rows)
    title = f"{torch.cuda.get_device_name()}, {args.model}, {args.sequence} tokens, one sequence a step"
    title += f", ours with {' '.join(args.set)}" if args.set else ""
    columns = ("what", "seconds", "tokens_per_second", "peak_gib", "ratio", "recompute", "failed")
    print_rows(rows, title, 160, columns)
    append_rows(args.json, rows, model=args.model, sequence=args.sequence, set=args.set)
    return 0


if __name__ == "__main__":
    sys.exit(main())
