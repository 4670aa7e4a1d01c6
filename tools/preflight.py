"""Is everything there that a run needs? `longspan preflight --config run.yaml --nproc 8` on each machine.

GPUs, memory, disk, weight files (their headers), settings, tokenizer, text (its first records), batch and the run that
the output holds are checked in seconds; no weight is read. Exit code 0: all there; 2: something is missing, one
sentence each on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config.paths import user_path
from pipeline.config.yaml_file import load_config
from pipeline.preflight.files import Finding
from pipeline.preflight.survey import Launch, survey
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number
from tools.support.machine import read_machine


def weights_bytes(folder: Path) -> int:
    """Check a checkpoint's files against its index, headers and config.json; returns the bytes of its tensors.

    Raises:
        CheckpointError: a file is missing, truncated or of another model; it is named.
    """
    # torch, which nothing else in a failing preflight needs
    from pipeline.hf.checkpoint import HfCheckpoint
    from pipeline.planning.arch import read_arch
    from pipeline.planning.tensors import hf_tensor_shapes, is_derived

    weights = HfCheckpoint(folder)
    weights.check(hf_tensor_shapes(read_arch(folder)), is_derived)
    return sum(fact.nbytes for fact in weights.facts.values())


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the table."""
    table = Table(title="Preflight", title_justify="left")
    for column in ("", "found", "needed", ""):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "[bold red]MISSING[/]" if finding.problem else "[green]ok[/]"
        table.add_row(escape(finding.name), escape(finding.found), escape(finding.needed), mark)
    console.print(table)


USUAL = 8
"""GPUs of a machine that one trains on, planned for from one that has none."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.preflight", __doc__, "LAUNCH.md")
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    said = f"processes on this machine (default: one a GPU here, {USUAL} where none is seen)"
    parser.add_argument("--nproc", type=whole_number(), help=said)
    parser.add_argument("--nnodes", type=whole_number(), default=1, metavar="M", help="machines (default 1)")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 when something is missing or the configuration is wrong."""
    args = parse(argv)
    machine = read_machine()
    if args.nproc is None:
        args.nproc = len(machine.gpus) or USUAL
    config = load_config(args.config, args.set)
    findings = survey(config, Launch(args.nproc, args.nnodes), machine, weights_bytes)
    show(findings, Console())
    problems = [finding.problem for finding in findings if finding.problem]
    for warning in (*config.warnings, *(line for finding in findings for line in finding.advice)):
        print(f"warning: {warning}", file=sys.stderr)
    for problem in problems:
        print(f"missing: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
