"""Will it fit, how fast, which layout: `longspan plan --model llama2-70b --context 32k --gpus 8 --gpu h100-80gb`

Nothing is downloaded, opened or allocated: the answer follows from the model's config.json, the settings and a
description of the GPU (pipeline/planner/gpus.yaml). `--config run.yaml` plans a run that is written already. Several
`--gpus` (8..4096) or `--context` (32k,128k) print how the best layout scales.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from parallel.errors import ConfigError
from pipeline.config.paths import user_path
from pipeline.config.run import RunConfig
from pipeline.config.sections import BASES, AttentionConfig, DataConfig, ModelConfig, TrainConfig
from pipeline.config.yaml_file import load_config, overridden
from pipeline.planner.choose import Site, Timed, best_layouts, choices, ranked
from pipeline.planner.explain import Way, refusal
from pipeline.planner.gpus import find_gpu
from pipeline.planner.models import Model, find_model
from pipeline.planner.run_file import run_yaml
from pipeline.planner.scaling import scale
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.command_line import console_of
from tools.support.plan_view import show_layouts, show_plan, show_scaling
from tools.support.quantities import counts, lengths, memory, quantity

SHOWN = 4
WIDTH = 120
STEPS = 1000
"""Optimizer steps where nothing is said of tokens: the paper's."""
FLAGS = {
    "model.path": "model",
    "model.context": "context",
    "data.sequence": "context",
    "attention.group_size": "group",
    "model.base": "base",
    "train.global_batch": "batch",
}
"""Of a YAML's settings, what they are called beside --model."""
OF_FLAGS = {"context": "model.context", "group": "attention.group_size", "data": "data.path"}
"""The other way round, of options that go with --model alone."""
TEXT = "data/train"
GPUS = "write how many, such as 8, several (8,16) or a range (8..4096); which they are is for --gpu"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.plan", __doc__, "PLANNER.md")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="llama2-70b and the like, a hub's config.json, or a checkpoint folder")
    what.add_argument("--config", type=user_path, help="YAML of a run, of which the layout is planned anew")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a setting of the run")
    parser.add_argument("--context", help="tokens of a sequence, such as 32k (with --model)")
    parser.add_argument("--gpus", default="8", help="GPUs of the run (default 8)")
    parser.add_argument("--gpu", default="h100-80gb", help="kind of GPU, or a file of longspan bench calibrate")
    parser.add_argument("--host-memory", help="of one machine, GiB or 512GB (default: what such a machine has)")
    parser.add_argument("--tokens", help="tokens to train on, such as 2.1B (default: 1000 steps, or the YAML's)")
    parser.add_argument("--batch", help="sequences an optimizer step (default 64, or the YAML's)")
    parser.add_argument("--base", choices=BASES, help="form of the frozen matrices (default bf16, or the YAML's)")
    parser.add_argument("--group", help="tokens of an S² group, such as 8k (with --model; default: a quarter)")
    parser.add_argument("--data", help=f"training text, for the YAML (with --model; default {TEXT})")
    parser.add_argument("--output", type=user_path, help="write the best layout's YAML here")
    parser.add_argument("--png", type=user_path, help="draw memory by rank and kind here")
    return parser.parse_args(argv)


def wanted(args: argparse.Namespace, context: int | None) -> tuple[RunConfig, Model]:
    """The run to plan and its model.

    Raises:
        ConfigError: the arguments contradict each other or name nothing.
    """
    if args.config is not None:
        for flag, given in (("context", context), ("group", args.group), ("data", args.data)):
            if given is not None:
                raise ConfigError(f"--{flag}: the YAML says it; use --set {OF_FLAGS[flag]}=..., or --model alone.")
        config = load_config(args.config, args.set)
        model = find_model(config.model.path)
    else:
        if context is None:
            raise ConfigError("--context: is missing; say how many tokens a sequence has, such as --context 32k.")
        model = find_model(args.model)
        train = TrainConfig(steps=STEPS)
        name = f"{Path(model.path).name}_{context}"
        group = None if args.group is None else quantity("--group", args.group, 1024)
        attention = AttentionConfig(group_size=group)
        config = RunConfig(
            ModelConfig(model.path, context), DataConfig(args.data or TEXT), train, f"runs/{name}", attention=attention
        )
        config = overridden(config, args.set)
        if config.model.path != model.path:
            raise ConfigError("--set: model.path is what --model says; give the other model there.")
    if args.base is not None:
        config = replace(config, model=replace(config.model, base=args.base))
    train = config.train
    if args.batch is not None:
        train = replace(train, global_batch=quantity("--batch", args.batch, 1000))
    if args.tokens is not None:
        tokens, step = quantity("--tokens", args.tokens, 1000), train.global_batch * config.sequence
        if tokens < step:
            raise ConfigError(
                f"--tokens: {args.tokens} is less than one optimizer step of {train.global_batch} sequences of "
                f"{config.sequence} tokens ({step:,}); give more, or a smaller --batch."
            )
        train = replace(train, steps=-(-tokens // step))
    return replace(config, train=train), model


def in_flags(way: Way) -> str:
    """A way out as options beside --model."""
    words = []
    for setting in way.settings:
        name, _, value = setting.partition("=")
        if value == "null":
            words.append(f"without --{FLAGS[name]}")
        elif name in FLAGS:
            words.append(f"--{FLAGS[name]} {value}")
        elif name != "train.stream":  # what fits no other way is streamed unasked
            words.append(f"--set {setting}")
    return " ".join([*words, *way.flags.split()])


def in_settings(way: Way) -> str:
    """A way out as options beside --config."""
    return " ".join([*(f"--set {setting}" for setting in way.settings), *way.flags.split()])


def plan_one(config: RunConfig, model: Model, site: Site, said: Callable[[Way], str]) -> list[Timed]:
    """The best layout of every kind, best first.

    Args:
        said: how a way out is to be told.

    Raises:
        ConfigError: none fits; by how much, and what would.
    """
    found = choices(config, model.arch, site)
    best = best_layouts(ranked(found), SHOWN)
    if not best:
        raise refusal(found, config, model.arch, site, said)
    return best


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence: nothing fits, or the arguments are wrong."""
    args = parse(argv)
    try:
        return plan(args)
    except ConfigError as error:
        setting, colon, rest = str(error).partition(":")
        if args.config is None and setting in FLAGS:
            raise ConfigError(f"--{FLAGS[setting]}{colon}{rest}") from None
        raise


def plan(args: argparse.Namespace) -> int:
    """See `main`."""
    said = in_flags if args.config is None else in_settings
    gpus = counts("--gpus", args.gpus, such_as=GPUS)
    contexts = [None] if args.context is None else list(lengths("--context", args.context))
    host = None if args.host_memory is None else memory("--host-memory", args.host_memory)
    gpu, console = find_gpu(args.gpu), console_of(WIDTH, highlight=False, soft_wrap=True)
    if len(gpus) > 1 or len(contexts) > 1:
        for name in ("output", "png"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name}: belongs to one plan; give one number to --gpus and to --context.")
        for context in contexts:
            config, model = wanted(args, context)
            tables = [(scale(config, model.arch, gpu, gpus, weak=weak, host=host), weak) for weak in (False, True)]
            if not any(point.best for points, _ in tables for point in points):
                plan_one(config, model, Site.of(gpu, gpus[-1], host), said)  # says what is lacking
            for points, weak in tables:
                show_scaling(console, config, points, weak)
        return 0
    config, model = wanted(args, contexts[0])
    site = Site.of(gpu, gpus[0], host)
    best = plan_one(config, model, site, said)
    show_layouts(console, best)
    show_plan(console, best[0])
    text = run_yaml(best[0].candidate.plan.config)
    console.print("\nThe YAML, ready to run:\n")
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    if args.png is not None:
        from tools.support.plan_plots import write_memory  # matplotlib takes longer than the plan

        write_memory(best[0].candidate, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
