"""Compare recipes of context extension on one model: `python -m tools.study --study study.yaml --model DIR --text DIR`

Each recipe is trained by the product's trainer, in this process, and judged by perplexity, the last tokens of long
windows and retrieval. Finished runs are kept by a hash of what decides them: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config.paths import user_path
from pipeline.reporting.command import command, program
from pipeline.storage.json_file import replace_json
from tools.study.plan import Places, read_study

DEFAULT = Path(__file__).with_name("recipes.yaml")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog=program("tools.study"), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", type=user_path, default=DEFAULT, help="YAML of recipes (default: %(default)s)")
    parser.add_argument(
        "--config", type=user_path, default=Path("launch/configs/tiny_gpu.yaml"), help="run they change"
    )
    parser.add_argument("--model", type=user_path, required=True, help="folder of the base")
    parser.add_argument("--text", type=user_path, required=True, help="folder with train/ and val/")
    parser.add_argument("--output", type=user_path, default=Path("runs/study"), help="results and the table")
    parser.add_argument("--runs", type=user_path, help="checkpoints and tokens (default: OUTPUT/runs)")
    parser.add_argument("--seconds", type=float, help="leave in good order before so many have passed")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a setting of every run")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="recipes by name (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="instead of the study's")
    parser.add_argument("--ruler", nargs="+", default=[], metavar="TASK", help="judge by RULER too: `ruler`, or tasks")
    parser.add_argument("--code", type=user_path, help="Python code to mix (default: Python's standard library)")
    parser.add_argument("--list", action="store_true", help="only say which runs there are")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 (also when time ran out: the same command goes on), or 2 with one sentence on standard error."""
    args = parse(argv)
    study = read_study(args.study).only(args.only, args.seeds)
    if args.ruler:
        study = replace(study, judge=replace(study.judge, ruler=tuple(args.ruler)))
    if args.list:
        for number, (recipe, seed) in enumerate(study.order(), start=1):
            print(f"{number:3d}  {recipe.name}, seed {seed}")
        return 0
    runs = args.runs or args.output / "runs"
    places = Places(args.config, args.model, args.text / "train", args.text / "val", runs, tuple(args.set), args.code)
    # Both import torch, which a wrong study need not wait for.
    from tools.study.run import Outcome, Workshop
    from tools.study.table import figures, markdown

    workshop = Workshop(study, places, args.output / "results", args.seconds, lambda text: print(text, flush=True))

    def show(outcomes: list[Outcome]) -> None:
        base = next((run for run in outcomes if run.recipe.untrained and run.recipe.stretch == 1), None)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.md").write_text(markdown(outcomes, base))
        replace_json(args.output / "table.json", figures(outcomes, base))

    outcomes, reason = workshop.run(show)
    show(outcomes)
    print((args.output / "table.md").read_text())
    if reason:
        print(f"left early: {reason}; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
