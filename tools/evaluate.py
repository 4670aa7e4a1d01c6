"""Perplexity, retrieval and RULER of a run's model, or of any Hugging Face folder, under full attention.

longspan evaluate --config run.yaml --state shipped|untrained|trained --tasks perplexity,passkey
longspan evaluate --model DIR --text held-out/ --output OUT --lengths 4096 8192
longspan evaluate --adapter DIR --base DIR --text held-out/ --output OUT
longspan evaluate --compare OUT runs/a runs/b
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parallel.errors import ConfigError, DataError
from parallel.world.rank_env import RankEnv
from pipeline.config.evaluation import RULER_TASKS as RULER
from pipeline.config.evaluation import EvalConfig
from pipeline.config.hub import model_folder
from pipeline.config.paths import model_path, user_path
from pipeline.config.run import RunConfig
from pipeline.config.sections import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from pipeline.config.yaml_file import dump_config, load_config
from pipeline.evaluation.grid import fit_ranks
from pipeline.evaluation.ruler.tasks import RulerSettings
from pipeline.export.adapter_notes import read_config, read_note, told_context
from pipeline.planning.arch import read_arch
from pipeline.reporting.command import command, say
from pipeline.reporting.parser import Parser
from tools.support.strength import STRENGTH, strength

TASKS = ("perplexity", "longppl", "passkey", "needle", "ruler")
"""`ruler`: all of RULER's; each has its own name too."""
PICTURE = "evaluations.png"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.evaluate", __doc__, "EVALUATION.md")
    parser.add_argument("--config", type=user_path, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    parser.add_argument("--model", type=model_path, help="instead of --config: a folder, or name of the Hub")
    parser.add_argument("--adapter", type=model_path, help="likewise: a PEFT adapter, or LongLoRA's two files")
    parser.add_argument("--base", type=model_path, help="with --adapter: its base, where the folder does not tell")
    parser.add_argument("--context", type=int, help="with --adapter: tokens of the result, likewise")
    parser.add_argument("--text", type=user_path, help="with --model, --adapter: held-out text")
    parser.add_argument("--output", type=user_path, help="with --model, --adapter: where the reports go")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens; default: eval.lengths")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--state", choices=("shipped", "untrained", "trained"), help="which model to evaluate")
    what.add_argument(
        "--compare",
        nargs="*",
        type=user_path,
        metavar="DIR",
        help="only compare what was evaluated so far",
    )
    parser.add_argument("--checkpoint", type=user_path, help="with --state trained: not the newest but this one")
    said = f"of --state trained and --adapter: {STRENGTH}"
    parser.add_argument("--strength", type=strength, default=1.0, help=said)
    parser.add_argument(
        "--tasks",
        default="perplexity",
        help=f"some of {','.join(TASKS)}, or of RULER's tasks by name (default: %(default)s)",
    )
    parser.add_argument("--trials", type=int, help="prompts a length and depth (default: eval.trials)")
    parser.add_argument("--depths", type=int, metavar="N", help="from 0 to 100%% (default: eval.depths)")
    parser.add_argument("--digits", type=int, default=5, help="of the key (default: %(default)s)")
    parser.add_argument("--filler", choices=("grass", "text"), help="of passkey: LongLoRA's sentences, or the text")
    parser.add_argument("--short", type=int, default=4096, metavar="N", help="short context of longppl, tokens")
    parser.add_argument("--keys", type=user_path, metavar="JSON", help="longppl: key tokens of this longppl-*.json")
    parser.add_argument("--seed", type=int, default=0, help="of keys and filler (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = args.model or args.adapter
    if args.compare is None and args.state is None and folder is None:
        parser.error("say --state which model to evaluate, --model or --adapter a folder, or --compare.")
    if folder is not None and (args.config is not None or args.text is None or args.output is None):
        parser.error("--model and --adapter need --text and --output, and no --config.")
    if args.model is not None and args.adapter is not None:
        parser.error("--model is evaluated alone; an --adapter's base is --base.")
    if (args.base or args.context) and args.adapter is None:
        parser.error("--base and --context are for --adapter.")
    if folder is not None and args.state not in (None, "shipped"):
        parser.error("--model and --adapter are evaluated as they are; --state is for a run.")
    if args.config is None and folder is None and not args.compare:
        parser.error("--config is needed, or --model, or --adapter.")
    if args.strength != 1 and args.state != "trained" and args.adapter is None:
        parser.error("--strength is for --state trained and --adapter.")
    if args.checkpoint is not None and args.state != "trained":
        parser.error("--checkpoint is for --state trained.")
    return args


def configure(args: argparse.Namespace) -> RunConfig:
    """The run, or one made up around a folder (and written beside its reports).

    Raises:
        ConfigError, CheckpointError: one sentence each.
    """
    overrides = list(args.set)
    for name in ("lengths", "depths", "trials"):
        if getattr(args, name) is not None:
            overrides.append(f"eval.{name}={getattr(args, name)}")
    if args.depths is not None or args.trials is not None:
        overrides.append("eval.ruler_trials=null")
    if args.config is not None:
        return load_config(args.config, overrides)
    if args.adapter is not None:
        from pipeline.export.adapter_read import must_tell  # it imports torch
        from pipeline.export.trained_model import find_base

        # What its folder tells; the rest is read with the base at hand.
        note, declared = read_note(args.adapter), read_config(args.adapter)
        model = find_base(str(declared.get("base_model_name_or_path")), args.base)
        arch = read_arch(model)
        context = told_context(note, arch, args.context, args.adapter, must_tell(args.adapter, arch))
    else:
        model = model_folder("--model", args.model)
        arch = read_arch(model)
        context = min(arch.max_positions, arch.sliding_window or arch.max_positions)
    window = arch.sliding_window
    # S² plays no part here, and its groups must not be longer than the window.
    group = window // 2 * 2 if window is not None and window < context else None
    config = RunConfig(
        model=ModelConfig(str(model), context),
        attention=AttentionConfig(group_size=group),
        data=DataConfig(str(args.text)),
        train=TrainConfig(steps=1),
        eval=EvalConfig(path=str(args.text)),
        output=str(args.output),
    )
    path = args.output / "evaluate.yaml"
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")  # each rank writes it
        whole.write_text(dump_config(config))
        whole.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another --output.") from None
    return load_config(path, overrides)


def evaluate(args: argparse.Namespace, config: RunConfig, env: RankEnv) -> None:
    """Measure what --tasks asks for."""
    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    for task in tasks:
        if task not in (*TASKS, *RULER):
            raise ConfigError(f"--tasks: {task!r} is not one of {', '.join((*TASKS, *RULER))}.")
    longest = max(config.eval_lengths)
    if "longppl" in tasks and args.keys is None and not 2 <= args.short < longest:
        raise ConfigError(f"--short: {args.short} tokens are no less than the windows' {longest}; give fewer.")
    # Torch and megatron load only once the configuration is known to be good.
    from pipeline.evaluation.assessment import retrieval_grids
    from pipeline.evaluation.entry import evaluate_state
    from pipeline.evaluation.long_ppl import LongPpl, LongPplAsked
    from tools.support.sources import refuse_run

    refuse_run(args.checkpoint, "leave --checkpoint out for its newest")
    lengths = tuple(args.lengths or config.retrieval_lengths)
    grids = retrieval_grids(
        config.eval,
        [task for task in tasks if task in ("passkey", "needle")],
        lengths,
        args.digits,
        args.seed,
        args.filler or "grass",
    )
    riddles = RULER if "ruler" in tasks else tuple(task for task in RULER if task in tasks)
    ruler_lengths = tuple(args.lengths or config.ruler_lengths)
    ruler = RulerSettings(riddles, ruler_lengths, config.ruler_prompts, args.seed) if riddles else None
    if env.is_main:
        grid = fit_ranks(config, env.world_size).parallel
        if grid != config.parallel:
            say(
                f"Evaluated on the ranks that are here, {env.world_size}: tp {grid.tp} cp {grid.cp} pp {grid.pp}; the "
                "figures do not depend on it."
            )
        beyond = beyond_own_context(args, config, (*lengths, *(ruler_lengths if ruler else ())))
        # Of a run that was made up around a folder, only what was asked for counts.
        own = [line for line in config.warnings if args.config is not None or line.startswith("eval.lengths")]
        for warning in (*own, *beyond):
            say(f"warning: {warning}")
    keys = None if args.keys is None or "longppl" not in tasks else LongPpl.read(args.keys)
    long_ppl = LongPplAsked(args.short, keys) if "longppl" in tasks else None
    state = "adapter" if args.adapter is not None else args.state or "shipped"
    folder = args.adapter or args.checkpoint
    evaluate_state(config, env, state, folder, "perplexity" in tasks, grids, long_ppl, ruler, args.strength)


def beyond_own_context(args: argparse.Namespace, config: RunConfig, lengths: Sequence[int]) -> tuple[str, ...]:
    """A sentence on lengths that a base as shipped was not made for."""
    own = read_arch(Path(config.model.path)).max_positions
    beyond = sorted(length for length in {*lengths, *config.eval_lengths} if length > own)
    if args.state != "shipped" or args.config is None or not beyond:
        return ()
    return (
        f"--lengths: {', '.join(map(str, beyond))} exceed the {own} tokens that {config.model.path} was made for; what "
        "it does there is no measure of it.",
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on standard error."""
    args = parse(argv)
    folders = list(args.compare or [])
    if args.config is not None or args.model is not None or args.adapter is not None:
        config = configure(args)
        folders = folders or [Path(config.output)]
        if args.compare is None:
            env = RankEnv.read()
            evaluate(args, config, env)
            if not env.is_main:
                return 0
    from tools.compare_evaluations import read_evaluated, sentences, tables

    if args.compare is None and args.tasks.strip() == "longppl":
        return 0  # said already
    everything = read_evaluated(folders)
    console = Console()
    for sentence in sentences(everything):  # what was lost comes first
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for table in tables(everything):
        console.print(table)
    if any(one.retrieval or one.ruler for one in everything):
        from tools.retrieval_plots import page

        picture = folders[0] / PICTURE
        page(picture, everything)
        console.print(f"Heat maps: {picture}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
