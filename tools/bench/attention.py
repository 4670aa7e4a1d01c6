"""Time attention on one GPU: full, S² as published, and ours, for every backend the device offers, in one run.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table

from parallel.errors import ConfigError
from pipeline.config.paths import user_path
from pipeline.model.attention.backends import Backend, select_backend
from pipeline.model.attention.local import attend
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.command_line import add_integers, console_of

BACKENDS = ("cudnn", "flash", "flash_attn_2", "flash_attn_4")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def published_s2(
    q_SBHD: torch.Tensor, k_SBHD: torch.Tensor, v_SBHD: torch.Tensor, group: int, backend: Backend
) -> torch.Tensor:
    """S² as the paper's code writes it (LongLoRA, Algorithm 1); shapes as `attend`."""
    sequence, batch, heads, dim = q_SBHD.shape
    ratio = heads // k_SBHD.shape[2]

    def grouped(x_SBHD: torch.Tensor) -> torch.Tensor:
        low, high = x_SBHD.transpose(0, 1).chunk(2, dim=2)
        x_BSHD = torch.cat((low, high.roll(-group // 2, 1)), dim=2)
        return x_BSHD.reshape(batch * (sequence // group), group, heads, dim)

    k, v = (tensor.repeat_interleave(ratio, dim=2) for tensor in (k_SBHD, v_SBHD))
    out = backend.dense(grouped(q_SBHD), grouped(k), grouped(v), dim**-0.5).reshape(batch, sequence, heads, dim)
    low, high = out.chunk(2, dim=2)
    return torch.cat((low, high.roll(group // 2, 1)), dim=2).transpose(0, 1)


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Median time of `work` on the current CUDA stream, after three warm-ups."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def score_pairs(layout: SequenceLayout, group: int | None, shifts: list[bool]) -> int:
    """(query, key) pairs the causal masks admit, over the given heads."""
    pairs = 0
    for shifted in (False, True):
        lengths = [stop - start for _, start, stop in layout.segments(group, shifted)]
        pairs += shifts.count(shifted) * sum(length * (length + 1) // 2 for length in lengths)
    return pairs


def measure(name: str, pairs: int, run: Callable[[], torch.Tensor], inputs: Tensors, repeats: int) -> dict[str, Any]:
    """Forward and forward+backward of one variant: ms, TFLOP/s by admitted pairs (4 D forward, 14 D with backward)."""
    dim = inputs[0].shape[-1]
    weight = torch.randn_like(run())

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run(), inputs, weight)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_ms, both_ms = milliseconds(forward, repeats), milliseconds(both, repeats)
    return {
        "variant": name,
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "forward_tflops": 4 * dim * pairs / forward_ms / 1e9,
        "forward_backward_tflops": 14 * dim * pairs / both_ms / 1e9,
        "peak_extra_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
    }


def run_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of results, and a sentence for each backend left out."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(args.length, args.batch, heads, args.dim, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    layout = SequenceLayout.dense(args.batch, args.length)
    plan = head_plan(0, args.heads, args.heads, args.kv_heads, "upper_half")
    shifts = [block.shifted for block in plan.blocks for _ in range(block.q_stop - block.q_start)]
    s2_pairs = score_pairs(layout, args.group, shifts)
    rows, missing = [], []
    for name in BACKENDS:
        try:
            backend = select_backend(name, device, torch.bfloat16, args.dim)
        except ConfigError as error:
            missing.append(str(error))
            continue
        full = AttentionSpec("full", args.group, backend=name)
        ours = AttentionSpec("s2", args.group, backend=name)
        variants: list[tuple[str, int, Callable[[], torch.Tensor]]] = [
            ("full", score_pairs(layout, None, shifts), partial(attend, q, k, v, layout, full, plan)),
            ("S² (ours)", s2_pairs, partial(attend, q, k, v, layout, ours, plan)),
        ]
        if args.length % args.group == 0 and args.heads % 2 == 0:
            rolled_pairs = score_pairs(layout, args.group, [False] * args.heads)
            variants.insert(1, ("S² as published", rolled_pairs, partial(published_s2, q, k, v, args.group, backend)))
        for title, pairs, run in variants:
            rows.append({"backend": name, **measure(title, pairs, run, (q, k, v), args.repeats)})
    return rows, missing


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the shape, measure, print a table."""
    parser = Parser("tools.bench.attention", __doc__, "BENCHES.md")
    add_integers(
        parser,
        ("--heads", 64, "query heads"),
        ("--kv-heads", 8, "KV heads"),
        ("--dim", 128, "head dimension"),
        ("--length", 32768, "tokens a sequence"),
        ("--group", 8192, "S² group, tokens"),
        ("--batch", 1, "sequences"),
        ("--repeats", 20, "timed repetitions"),
    )
    parser.add_argument("--json", type=user_path, help="also write the numbers here")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "This benchmark needs a CUDA device; none was found.\n")
    try:
        rows, missing = run_all(args)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    shape = {key: getattr(args, key) for key in ("heads", "kv_heads", "dim", "length", "group", "batch", "repeats")}
    device = torch.cuda.get_device_name()
    table = Table(
        title=f"{device}, torch {torch.__version__}, bf16, " + ", ".join(f"{k} {v}" for k, v in shape.items())
    )
    for column in ("backend", "variant", "fwd ms", "fwd+bwd ms", "fwd TFLOP/s", "fwd+bwd TFLOP/s", "peak extra GiB"):
        table.add_column(column, justify="left" if column in ("backend", "variant") else "right")
    for row in rows:
        backend, variant, *numbers = row.values()
        table.add_row(backend, variant, *(f"{number:.2f}" for number in numbers))
    console = console_of(140)
    console.print(table)
    for sentence in missing:
        console.print(f"Left out: {sentence}", highlight=False)
    if args.json:
        result = {"device": device, "torch": torch.__version__, "shape": shape, "rows": rows, "left_out": missing}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
