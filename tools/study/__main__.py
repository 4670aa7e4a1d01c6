"""Compare recipes of context extension on one model: `longspan study --plan table2 --model DIR --text DIR`

Each recipe is trained by the product's trainer, in this process, and judged by perplexity, the last tokens of long
windows and retrieval. Finished runs are kept by a hash of what decides them: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.hub import model_folder
from pipeline.config.paths import model_path, user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.storage.durable import replace_text
from pipeline.storage.json_file import replace_json
from tools.init import SHIPPED
from tools.study.plan import Places
from tools.study.recipe_file import asked, plan_file, read_study
from tools.study.workload import listing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.study", __doc__, "RECIPES.md")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--plan", default="recipes", help="table1, table2, table6, groups, fixed, bases, or recipes (the default)"
    )
    what.add_argument("--study", type=user_path, help="instead: a YAML of recipes of your own")
    parser.add_argument(
        "--config",
        type=user_path,
        default=SHIPPED / "configs/tiny_gpu.yaml",
        help="run they change (default: the shipped tiny_gpu.yaml)",
    )
    parser.add_argument("--model", type=model_path, required=True, help="folder of the base, or name of the Hub")
    parser.add_argument("--text", type=user_path, required=True, help="folder with train/ and val/")
    parser.add_argument("--output", type=user_path, default=Path("runs/study"), help="results and the table")
    parser.add_argument("--runs", type=user_path, help="checkpoints and tokens (default: OUTPUT/runs)")
    parser.add_argument("--seconds", type=float, help="leave in good order before so many have passed")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a setting of every run")
    parser.add_argument("--judge", nargs="+", default=[], metavar="a=b", help="instead of the study's: trials=2")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="recipes by name (default: all)")
    parser.add_argument("--equal-seconds", metavar="NAME", help="train each recipe in this one's seconds too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="instead of the study's")
    parser.add_argument("--ruler", nargs="+", default=[], metavar="TASK", help="judge by RULER too: `ruler`, or tasks")
    parser.add_argument("--code", type=user_path, help="Python code to mix (default: Python's standard library)")
    parser.add_argument("--list", action="store_true", help="only say which runs there are, and what they read")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 (also when time ran out: the same command goes on), or 2 with one sentence on standard error."""
    args = parse(argv)
    path = args.study or plan_file(args.plan)
    plain = read_study(path)
    study = asked(plain, args.judge, args.ruler).only(args.only, args.seeds)
    if args.equal_seconds:
        study = study.in_seconds_of(args.equal_seconds)
    name = "table" if path == plan_file("recipes") else path.stem
    runs = args.runs or args.output / "runs"
    places = Places(args.config, args.model, args.text / "train", args.text / "val", runs, tuple(args.set), args.code)
    if args.list:
        for line in listing(study, places):
            print(line)
        return 0
    model_folder("--model", args.model)
    # Both import torch, which a wrong study need not wait for.
    from tools.study.plots import drawn
    from tools.study.run import Outcome, Workshop
    from tools.study.table import comparisons, figures
    from tools.support.report_plots import to_png

    workshop = Workshop(study, places, args.output / "results", args.seconds, lambda text: print(text, flush=True))

    # Beside the table of the plan's own questions, not over it.
    table = args.output / (f"{name}.md" if study.judge == plain.judge else f"{name}-{workshop.asked[:8]}.md")

    def show(outcomes: list[Outcome]) -> None:
        base = next((run for run in outcomes if run.recipe.untrained and run.recipe.stretch == 1), None)
        args.output.mkdir(parents=True, exist_ok=True)
        ended = "".join(f"\nDiverged: {sentence}\n" for sentence in workshop.diverged)
        replace_text(table, comparisons(outcomes, base) + ended)
        found = figures(outcomes, base)
        replace_json(table.with_suffix(".json"), found)
        if outcomes:
            table.with_suffix(".png").write_bytes(to_png(drawn(found)))

    outcomes, reason = workshop.run(show)
    show(outcomes)
    print(table.read_text())
    if reason:
        print(f"left early: {reason}; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
