"""Perplexity of a run's model: `python -m tools.evaluate --config run.yaml --state shipped|untrained|trained`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parallel.errors import DataError
from parallel.world.rank_env import RankEnv
from pipeline.config.paths import user_path
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.grid import fit_ranks
from pipeline.evaluation.perplexity import EvalReport
from pipeline.reporting.command import command, say

SHOWN = {"shipped": "as shipped", "untrained": "RoPE stretched, untrained", "after": "trained"}


def compare(folder: Path) -> Table:
    """Table of every `eval-*.json` of a run: a row a state, a column a context length.

    Raises:
        DataError: the run was never evaluated.
    """
    reports = [EvalReport.read(path) for path in sorted(folder.glob("eval-*.json"))]
    if not reports:
        raise DataError(f"{folder}: holds no eval-*.json; evaluate the run first.")
    lengths = sorted({length for report in reports for length in report.perplexity})
    table = Table(title="Perplexity by context length, tokens (full attention)")
    table.add_column("model")
    for length in lengths:
        table.add_column(str(length), justify="right")
    order = list(SHOWN)
    reports.sort(key=lambda r: (order.index(r.label) if r.label in order else 1.5, r.step))
    for report in reports:
        found = report.perplexity
        cells = [f"{found[length]:.2f}" if length in found else "" for length in lengths]
        table.add_row(SHOWN.get(report.label, report.label), *cells)
    return table


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__)
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--state", choices=("shipped", "untrained", "trained"), help="which model to evaluate")
    what.add_argument("--compare", action="store_true", help="only print what was evaluated so far")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    if args.state:
        # Torch and megatron load only once the configuration is known to be good.
        from pipeline.evaluation.evaluator import evaluate_state

        env = RankEnv.read()
        grid = fit_ranks(config, env.world_size).parallel
        if grid != config.parallel and env.is_main:
            say(
                f"Evaluated on the ranks that are here, {env.world_size}: tp {grid.tp} cp {grid.cp} pp {grid.pp}; the "
                "figures do not depend on it."
            )
        evaluate_state(config, env, args.state)
        if not env.is_main:
            return 0
    Console().print(compare(Path(config.output)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
