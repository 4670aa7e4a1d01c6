"""Does this configuration compute on its grid what one process computes? `longspan doctor --config run.yaml`

The configuration is shrunk (`support.shrink`: same axes, same options, tiny sizes), run on local CPU processes and on
one, and compared: losses, gradients, weights after three steps, a one-token probe for leaks of the future, and the
run-time invariants. Exit code 0: all hold; 1: something does not, or a process failed; 2: the configuration is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parallel.errors import ConfigError
from pipeline.config.paths import user_path
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import dump_config, load_config
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number
from tools.support.local_ranks import RankFailed, run_local
from tools.support.shrink import Shrunk, shrink

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Finding:
    """One line of the table, as `tools.support.doctor_rank.Row`."""

    name: str
    value: str
    limit: str
    passed: bool
    hint: str


@dataclass(frozen=True)
class Report:
    """What one configuration gave."""

    shrunk: Shrunk
    rows: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)


def run_doctor(
    config: RunConfig,
    processes: int | None = None,
    plant: str | None = None,
    timeout_s: float = TIMEOUT_S,
    cuda: bool = False,
) -> Report:
    """Shrink, run and compare one configuration.

    Args:
        processes: see `shrink`.
        plant: for tests: `module:name` of a context manager that plants a fault in every process.
        timeout_s: for all processes, from start to end.
        cuda: run on this machine's GPUs, one a process, instead of its CPU.

    Raises:
        ConfigError: the configuration is wrong.
        RankFailed: a process failed or hung.
    """
    return run_doctors([(config, plant)], processes, timeout_s, cuda)[0]


def run_doctors(
    cases: Sequence[tuple[RunConfig, str | None]],
    processes: int | None = None,
    timeout_s: float = TIMEOUT_S,
    cuda: bool = False,
) -> list[Report]:
    """`run_doctor` of several (configuration, plant) in the same processes, which all must fit.

    Raises:
        ConfigError: a configuration is wrong, or needs another number of processes than the first.
        RankFailed: a process failed or hung.
    """
    with tempfile.TemporaryDirectory(prefix="longspan-doctor-") as name:
        folder = Path(name)
        shrunk, jobs = [], []
        # Cases of one configuration share its files and what one process gives.
        known: dict[RunConfig, tuple[Shrunk, Path]] = {}
        for config, plant in cases:
            if config not in known:
                home = folder / f"case-{len(known)}"
                home.mkdir()
                tiny = comparable(shrink(config, home, processes))
                (home / "run.yaml").write_text(dump_config(tiny.config))
                known[config] = tiny, home / "run.yaml"
            tiny, path = known[config]
            shrunk.append(tiny)
            jobs.append({"config": str(path), "model": tiny.model, "plant": plant})
        world = shrunk[0].processes
        if any(tiny.processes != world for tiny in shrunk):
            raise ConfigError("The configurations need different numbers of processes; give --processes.")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run_local("tools.support.doctor_rank", [str(folder / "jobs.json")], world, folder, timeout_s, cuda)
        tables = json.loads((folder / "findings.json").read_text())
        return [Report(tiny, tuple(Finding(**row) for row in rows)) for tiny, rows in zip(shrunk, tables, strict=True)]


def comparable(tiny: Shrunk) -> Shrunk:
    """The same without what makes two grids differ though both are right: FP8's rounding of activations."""
    if tiny.config.model.base != "fp8":
        return tiny
    config = replace(tiny.config, model=replace(tiny.config.model, base="bf16"))
    note = "model.base: fp8 rounds activations, and no two grids do it alike; the grid is compared with base: bf16."
    return replace(tiny, config=config, notes=(*tiny.notes, note))


def show(report: Report, console: Console, seconds: float) -> None:
    """Print the table, and what was run."""
    tiny, grid = report.shrunk, report.shrunk.config.parallel
    dp = tiny.processes // (grid.tp * grid.cp * grid.pp)
    table = Table(
        title=f"tp {grid.tp} x cp {grid.cp} x dp {dp} x pp {grid.pp}"
        + (f" ({grid.virtual} chunks a stage)" if grid.virtual > 1 else "")
        + f" against one process, {seconds:.0f} s",
        title_justify="left",
    )
    for column in ("check", "found", "limit", ""):
        table.add_column(column, overflow="fold")
    for row in report.rows:
        mark = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
        table.add_row(escape(row.name), escape(row.value), escape(row.limit), mark)
    console.print(table)
    model, config = tiny.model, tiny.config
    chunks = "" if config.train.stream is None else f", streamed in chunks of {config.train.stream}"
    console.print(
        f"Shrunk to {model['num_hidden_layers']} layers, {model['num_attention_heads']} query and "
        f"{model['num_key_value_heads']} KV heads, vocabulary {model['vocab_size']}, {config.sequence} tokens in "
        f"groups of {config.group}{chunks}; fp32, larger learning rate and epsilon than a run's.",
        highlight=False,
    )
    for note in tiny.notes:
        console.print(f"Note: {escape(note)}", highlight=False)
    for row in report.rows:
        if not row.passed:
            console.print(f"[bold red]FAIL[/] {escape(row.name)}: look at {escape(row.hint)}.", highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.doctor", __doc__, "LAUNCH.md")
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    parser.add_argument(
        "--processes", type=whole_number(), help="local processes; default: tp x cp x pp, twice that if at most 8"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds for everything")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU a process")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 pass, 1 fail, 2 wrong configuration."""
    args = parse(argv)
    began = time.perf_counter()
    try:
        config = load_config(args.config, args.set)
        report = run_doctor(config, args.processes, timeout_s=args.timeout, cuda=args.device == "cuda")
    except RankFailed as error:
        print(error if error.code == 2 else f"FAIL: {error}", file=sys.stderr)
        return 2 if error.code == 2 else 1
    show(report, Console(), time.perf_counter() - began)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
