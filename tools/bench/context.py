"""Time one attention layer under context parallelism over all ranks that torchrun started, ours against torch's ring.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from parallel.errors import ConfigError, LongspanError
from parallel.world.context_shard import ContextShard
from parallel.world.grid import plan_grid
from parallel.world.groups import Groups, destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.paths import user_path
from pipeline.model.attention.backends import Backend, LseKernel, select_backend
from pipeline.model.attention.local import attend
from pipeline.model.attention.sharded import context_attend
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout, head_plan
from pipeline.planning.context_shards import ring_bytes
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.bench.torch_ring import SEQUENCE_DIM, WAYS, Attention, refuses, ring_attention, ring_tokens
from tools.support.command_line import add_integers, console_of

RING = "full, torch ring"
CHECK_LENGTH = 4096
"""Longest sequence of the comparison with one process."""
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}
"""Norm of the error over the norm, of the output and of each gradient: bf16 rounding alone gives dk 6e-3."""
TIMEOUT_S = 90.0
"""Of collectives; between two of them lie seconds."""
LAUNCH_AHEAD = 10_000_000
"""GPU cycles (about 5 ms) that the GPU waits before a timed run, in which the CPU gets ahead of it."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer's attention."""

    name: str
    kind: str
    """s2 | full: the mathematics."""
    kernel: LseKernel | None = None
    """Of torch's ring; None: our own exchange."""
    way: str = ""
    """How torch's ring moves K and V."""
    balanced: bool = False
    """Of `full`: queries move, at any length."""


@dataclass(frozen=True)
class Row:
    """One variant at one length."""

    length: int
    group: int
    variant: str
    forward_ms: float | None = None
    """None: out of memory."""
    forward_backward_ms: float | None = None
    peak_extra_gib: float | None = None
    """Largest of all ranks', beyond inputs and the output's gradient; None on the CPU."""
    sent_bytes: tuple[int, ...] = ()
    """What each rank sends in a forward: K and V; queries that move, and outputs."""
    forward_speedup: float | None = None
    """Over the faster rotation of torch's ring."""
    forward_backward_speedup: float | None = None


class Bench:
    """The shapes and ranks; every rank calls the same methods in the same order."""

    def __init__(self, args: argparse.Namespace, groups: Groups) -> None:
        self.args, self.groups, self.device = args, groups, groups.device
        self.on_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_cuda else torch.float32
        self.backend: Backend = select_backend(args.backend, self.device, self.dtype, args.dim)
        self.heads: HeadPlan = head_plan(0, args.heads, args.heads, args.kv_heads, "upper_half")

    def shard(self, length: int) -> ContextShard:
        """This rank's tokens of a sequence of `length`."""
        shard = self.groups.context_shard(length // self.groups.plan.cp)
        assert shard is not None, "main has refused a single rank"
        return shard

    def attention(self, variant: Variant, shard: ContextShard, group: int) -> Attention:
        """The variant as a function of this rank's q, k and v."""
        if variant.kernel is not None:
            return ring_attention(variant.kernel, variant.way, shard.group)
        layout = SequenceLayout.dense(self.args.batch, shard.size * shard.tokens)
        lend_from = 0 if variant.balanced else None
        spec = AttentionSpec(variant.kind, group, backend=self.args.backend, lend_from=lend_from)
        return lambda q, k, v: context_attend(q, k, v, layout, spec, self.heads, shard)

    def draw(self, tokens: int, tokens_dim: int) -> tuple[Tensors, torch.Tensor]:
        """Random q, k, v and gradient of the output, [tokens, B, H, D], or [B, H, tokens, D] for `tokens_dim` 2."""
        shapes = [[self.args.batch, heads, self.args.dim] for heads in (self.args.heads, self.args.kv_heads)]
        for shape in shapes:
            shape.insert(tokens_dim, tokens)
        q, k, v, weight = (torch.randn(shapes[which], device=self.device, dtype=self.dtype) for which in (0, 1, 1, 0))
        return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), weight

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's maximum over the ranks; also a barrier."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.groups.collection.cp)
        return [float(value) for value in tensor.tolist()]

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Median over the repetitions of the slowest rank's time, after one more run."""
        work()
        times = []
        for _ in range(self.args.repeats):
            self.largest([0.0])
            if self.on_cuda:
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(LAUNCH_AHEAD)
                start.record()
                work()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop))
            else:
                began = time.perf_counter()
                work()
                times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(self.largest(times))

    def errors(self, variants: Sequence[Variant], length: int, group: int) -> list[float]:
        """Each variant's largest relative error against one process's attention to the whole sequence.

        Output, dq, dk and dv count alike. A variant that raises has an infinite error, and its rank says why.
        """
        torch.manual_seed(0)
        inputs, weight = self.draw(length, 0)
        for tensor in (*inputs, weight):
            dist.broadcast(tensor.detach(), 0)
        layout = SequenceLayout.dense(self.args.batch, length)
        expected = {}
        for kind in ("full", "s2"):
            out = attend(*inputs, layout, AttentionSpec(kind, group, backend=self.args.backend), self.heads)
            expected[kind] = [out.detach(), *torch.autograd.grad(out, inputs, weight)]
        shard = self.shard(length)
        zigzag = ring_tokens(length, shard.size, shard.rank, self.device)
        found = []
        for variant in variants:
            ring = variant.kernel is not None
            tokens = zigzag if ring else torch.arange(shard.start, shard.stop, device=self.device)
            own = [tensor.detach()[tokens] for tensor in (*inputs, weight)]
            if ring:
                own = [tensor.permute(1, 2, 0, 3).contiguous() for tensor in own]
            q, k, v, own_weight = own
            leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
            worst = math.inf
            # A kernel that refuses a shape on one rank only would leave the others amid a collective.
            refused = variant.kernel is not None and refuses(variant.kernel, q, k, v, own_weight)
            if any(self.largest([refused])):
                found.append(math.inf)
                continue
            try:
                out = self.attention(variant, shard, group)(q, k, v)
                parts = [out.detach(), *torch.autograd.grad(out, leaves, own_weight)]
                if ring:
                    parts = [part.permute(2, 0, 1, 3) for part in parts]
                worst = max(map(partial(relative_error, tokens=tokens), parts, expected[variant.kind]))
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                print(f"rank {shard.rank}: {variant.name} failed: {error}", file=sys.stderr, flush=True)
            found += self.largest([worst])
        return found

    def measure(self, variant: Variant, length: int, group: int, last: Row | None) -> Row:
        """Times, bytes and memory of one variant; `last`: the same at a shorter length, to foresee the memory."""
        shard = self.shard(length)
        attention = self.attention(variant, shard, group)
        torch.manual_seed(1 + shard.rank)
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        short, finite = False, True
        try:
            inputs, weight = self.draw(shard.tokens, 0 if variant.kernel is None else SEQUENCE_DIM)
            before = torch.cuda.memory_allocated() if self.on_cuda else 0
            if self._foreseen_short(length, last):
                return Row(length, group, variant.name)

            def forward() -> None:
                with torch.no_grad():
                    attention(*inputs)

            def both() -> Sequence[torch.Tensor]:
                return torch.autograd.grad(attention(*inputs), inputs, weight)

            # Values are compared at a small length only; indices that overflow at a large one leave traces.
            finite = all(bool(grad.isfinite().all()) for grad in both())
        except torch.OutOfMemoryError:
            short = True
        if any(self.largest([short])):
            return Row(length, group, variant.name)
        if any(self.largest([not finite])):
            raise LongspanError(f"{variant.name}: a gradient at {length} tokens is not finite; its kernel is broken.")
        already = shard.meter.sent
        forward()
        sent = shard.meter.sent - already
        if variant.kernel is not None:
            a = self.args
            sent = ring_bytes(a.batch, a.kv_heads, shard.size, shard.tokens, a.dim, self.dtype.itemsize)
        # One place a rank, 0 elsewhere: the maximum is everybody's number.
        everybody = self.largest([float(sent) if rank == shard.rank else 0.0 for rank in range(shard.size)])
        forward_ms, both_ms = self.milliseconds(forward), self.milliseconds(both)
        peak = self.largest([torch.cuda.max_memory_allocated() - before])[0] / 2**30 if self.on_cuda else None
        return Row(length, group, variant.name, forward_ms, both_ms, peak, tuple(map(int, everybody)))

    def _foreseen_short(self, length: int, last: Row | None) -> bool:
        """Whether the memory will not do on some rank; it grows with the length."""
        if last is None or not self.on_cuda:
            return False
        if last.peak_extra_gib is None:  # out of memory already
            return True
        wanted = last.peak_extra_gib * 2**30 * length / last.length
        return self.largest([wanted - torch.cuda.mem_get_info()[0]])[0] > 0


def relative_error(part: torch.Tensor, whole: torch.Tensor, tokens: torch.Tensor) -> float:
    """Norm of the difference of `part` from `whole[tokens]`, over the latter's norm; not a number: inf."""
    wanted = whole[tokens].float()
    error = float((part.float() - wanted).norm() / wanted.norm())
    return math.inf if math.isnan(error) else error


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Rows of one length, compared with the fastest of torch's ring among them."""
    rings = [row for row in rows if row.variant.startswith(RING) and row.forward_ms and row.forward_backward_ms]
    if not rings:
        return list(rows)
    forward = min(row.forward_ms or math.inf for row in rings)
    both = min(row.forward_backward_ms or math.inf for row in rings)
    return [
        replace(row, forward_speedup=forward / row.forward_ms, forward_backward_speedup=both / row.forward_backward_ms)
        if row.forward_ms and row.forward_backward_ms
        else row
        for row in rows
    ]


def right_ones(bench: Bench, variants: Sequence[Variant], console: Console) -> list[Variant]:
    """Those that agree with one process; says how well each does."""
    world = bench.groups.plan.cp
    length = min(*bench.args.lengths, CHECK_LENGTH) // (2 * world) * (2 * world)
    tolerance, right = TOLERANCE[bench.dtype], []
    for variant, error in zip(variants, bench.errors(variants, length, length // 8 * 2), strict=True):
        verdict = "right" if error <= tolerance else "WRONG, not timed"
        console.print(f"{variant.name}: error {error:.1e} at {length} tokens, tolerance {tolerance:g}: {verdict}")
        if error <= tolerance:
            right.append(variant)
    return right


def run_all(bench: Bench, console: Console, save: Callable[[Row], None]) -> tuple[list[Row], bool]:
    """Check, then time; the rows, and whether every variant was right. `save` gets each row once it is complete."""
    timed: list[Variant] = []
    tried = 0
    # The ring takes the first kernel that is right with it, in the backend's order, which is our own layers' too.
    for kernel in bench.backend.lse:
        rings = [Variant(f"{RING}, {way} ({kernel.name})", "full", kernel, way) for way in WAYS]
        timed, tried = right_ones(bench, rings, console), tried + len(rings)
        if timed:
            break
    if not tried:
        console.print(f"Left out: torch's ring, for backend {bench.backend.name} gives no log-sum-exps.")
    ours = [
        Variant("full, our all-gather", "full"),
        Variant("full, our all-gather, balanced", "full", balanced=True),
        Variant("S², our halo", "s2"),
    ]
    timed, tried = [*timed, *right_ones(bench, ours, console)], tried + len(ours)
    rows: list[Row] = []
    last: dict[str, Row] = {}
    for length in sorted(bench.args.lengths):
        group = bench.args.group or length // 4
        new = []
        for variant in timed:
            last[variant.name] = bench.measure(variant, length, group, last.get(variant.name))
            new.append(last[variant.name])
        for row in with_speedups(new):
            rows.append(row)
            save(row)
    return rows, len(timed) == tried


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The rows to look at."""
    table = Table(title=title)
    columns = ("length", "variant", "fwd ms", "fwd+bwd ms", "peak extra GiB", "MiB sent, most of a rank")
    for column in (*columns, "fwd x ring", "fwd+bwd x ring"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        numbers: list[float | None] = [row.forward_ms, row.forward_backward_ms, row.peak_extra_gib]
        numbers += [max(row.sent_bytes, default=0) / 2**20, row.forward_speedup, row.forward_backward_speedup]
        cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
        if row.forward_ms is None:
            cells = ["out of memory", *["-"] * 5]
        table.add_row(str(row.length), row.variant, *cells)
    return table


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the shape, check, measure, print a table on rank 0."""
    parser = Parser("tools.bench.context", __doc__, "BENCHES.md")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 262144], help="tokens a sequence")
    parser.add_argument("--group", type=int, help="S² group, tokens (default: a quarter of each length)")
    parser.add_argument("--backend", default="auto", help="attention backend of all variants (default auto)")
    add_integers(
        parser,
        ("--heads", 64, "query heads"),
        ("--kv-heads", 8, "KV heads"),
        ("--dim", 128, "head dimension"),
        ("--batch", 1, "sequences"),
        ("--repeats", 10, "timed repetitions"),
    )
    parser.add_argument("--json", type=user_path, help="also append the numbers here, one line a row")
    args = parser.parse_args(arguments)
    try:
        env = RankEnv.read()
        world = env.world_size
        if world < 2:
            raise ConfigError("This benchmark needs two ranks or more; start it with torchrun.")
        for length in args.lengths:
            if length < 8 * world or length % (2 * world):
                raise ConfigError(f"--lengths: {length} is not a multiple, from the fourth on, of 2 x {world} ranks.")
        bench = Bench(args, make_groups(plan_grid(world, 1, world, 1), env, timeout_s=TIMEOUT_S))
        name = torch.cuda.get_device_name() if bench.on_cuda else "CPU (no meaningful times)"
        shape = {key: getattr(args, key) for key in ("heads", "kv_heads", "dim", "batch", "repeats")}
        facts = {"device": name, "ranks": world, "torch": torch.__version__, "dtype": str(bench.dtype), **shape}
        console = console_of(160, quiet=not env.is_main, highlight=False)

        def save(row: Row) -> None:
            if args.json and env.is_main:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**facts, "backend": bench.backend.name, **asdict(row)}) + "\n")

        rows, right = run_all(bench, console, save)
    except LongspanError as error:
        parser.exit(2, f"{error}\n")
    finally:
        destroy_groups()
    title = f"{name}, {world} ranks, torch {torch.__version__}, {facts['dtype']}, backend {bench.backend.name}, "
    console.print(table_of(rows, title + ", ".join(f"{key} {value}" for key, value in shape.items())))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
