"""A plan on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pipeline.config.run import RunConfig
from pipeline.planner.choose import Timed
from pipeline.planner.explain import named, why
from pipeline.planner.scaling import Point, efficiency, where_it_stops
from pipeline.planning.memory import GIB
from tools.support.quantities import spelled


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}"


def in_hours(hours: float) -> str:
    """Hours to a tenth, fewer than one to two digits."""
    return f"{hours:,.1f}" if hours >= 0.95 else f"{hours:.2g}"


def show_scaling(console: Console, config: RunConfig, points: Sequence[Point], weak: bool) -> None:
    """How the best layout scales, and where each kind stops paying."""
    growing = f"{points[0].batch / points[0].gpus:g} sequences a GPU" if weak else f"{points[0].batch} sequences"
    title = f"{config.sequence:,} tokens a sequence, {growing} a step: {'weak' if weak else 'strong'} scaling"
    table = Table(title=title, title_justify="left")
    for column in ("GPUs", "s a step", "tokens/s/GPU", "efficiency", "GiB"):
        table.add_column(column, justify="right")
    table.add_column("best layout", overflow="fold")
    table.add_column("limited by")
    for point, share in zip(points, efficiency(points), strict=True):
        if point.best is None or share is None:
            table.add_row(str(point.gpus), "-", "-", "-", "-", "nothing fits, or the batch does not divide", "")
            continue
        one = point.best
        size = gib(one.candidate.memory.gpu_total)
        cells = (f"{one.time.total:.3g}", f"{point.tokens_per_second:,.0f}", f"{share:.0%}", size)
        table.add_row(str(point.gpus), *cells, named(one.candidate.plan), one.time.largest)
    console.print(table)
    for sentence in where_it_stops(points):
        console.print(sentence)


def show_layouts(console: Console, best: Sequence[Timed]) -> None:
    """The best and the next ones, with why."""
    first = best[0]
    site, plan = first.candidate.site, first.candidate.plan
    console.print(
        f"{site.gpus} x {site.gpu.name} ({gib(site.gpu.memory)} GiB each, {site.host / GIB:.0f} GiB of host memory a "
        f"machine), {plan.sequence:,} tokens a sequence, {plan.batch.global_batch} "
        f"{'sequence' if plan.batch.global_batch == 1 else 'sequences'} a step"
    )
    table = Table(title="Layouts, best first", title_justify="left")
    for column, justify in (("layout", "left"), ("s a step", "right"), ("tokens/s/GPU", "right"), ("GiB", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("why", overflow="fold")
    for one in best:
        table.add_row(
            named(one.candidate.plan),
            f"{one.time.total:.2f}",
            f"{one.tokens_per_second:,.0f}",
            gib(one.candidate.memory.gpu_total),
            why(one, first),
        )
    console.print(table)


def show_plan(console: Console, one: Timed) -> None:
    """Memory, time and hours of one layout."""
    candidate, time = one.candidate, one.time
    plan, site, memory = candidate.plan, candidate.site, candidate.memory
    table = Table(title="Peak memory of a GPU, GiB", title_justify="left", show_header=False)
    for kind, size in memory.gpu.items():
        if size:
            table.add_row(kind, gib(size))
    table.add_row("all", f"{gib(memory.gpu_total)} of {gib(site.gpu.memory)}", style="bold")
    console.print(table)
    host = ", ".join(f"{gib(size)} {part}" for part, size in memory.host.items())
    console.print(
        f"Host memory of a machine: {memory.machine / GIB:.1f} GiB of {site.host / GIB:.0f} ({site.a_node} processes: "
        f"{host}; {gib(memory.pinned)} of it pinned)"
    )
    table = Table(title="A step, seconds", title_justify="left", show_header=False)
    for part, seconds in time.parts.items():
        table.add_row(part, f"{seconds:.3f}", f"{seconds / time.total:.1%}")
    table.add_row("all", f"{time.total:.3f}", "", style="bold")
    if time.hidden:
        table.add_row("sent and copied beside it", f"{time.hidden:.3f}", "hidden", style="dim")
    console.print(table)
    steps = plan.config.train.steps
    hours = steps * time.total / 3600
    console.print(
        f"{one.tokens_per_second:,.0f} tokens/s a GPU, {one.tokens_per_second * site.gpus:,.0f} in all; {steps:,} "
        f"steps ({spelled(steps * plan.batch.global_batch * plan.sequence)} tokens) take {in_hours(hours)} hours, "
        f"{in_hours(hours * site.gpus)} GPU hours; most of it goes to "
        f"{time.largest}. Evaluations and saves come on top."
    )
    for sentence in plan.advice():
        console.print(f"warning: {sentence}")
