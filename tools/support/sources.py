"""Where an export's trained tensors come from, as command-line arguments: a run, a checkpoint or an adapter folder."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from parallel.errors import CheckpointError, ConfigError
from pipeline.checkpoint.choose import newest
from pipeline.config.paths import model_path, user_path
from pipeline.config.rope import ROPE_TYPES, RopeSettings
from pipeline.export.adapter_read import load_adapter
from pipeline.export.formats import export
from pipeline.export.part_way import part_way
from pipeline.export.trained_model import TrainedModel, load_trained_model
from pipeline.hf.writer import REPORT
from pipeline.planning.arch import read_arch
from pipeline.planning.rope import replacement_warning
from tools.support.push import Destination
from tools.support.strength import STRENGTH, strength

SETTINGS = {
    "model.rope.original_context": "--original-context",
    "original_context": "--original-context",
    "model.rope.factor": "--factor",
    "model.rope.theta": "--theta",
    "model.rope.type": "--rope",
    "model.rope": "--rope",
    "model.context": "--context",
    "model.path": "--base",
}
"""Settings of a run that errors name, and the options here that stand for them; longer names first."""


def find_checkpoint(run: Path) -> Path:
    """Newest checkpoint of a run's output folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = newest(run / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{run}: holds no checkpoint; give the output folder of a run that has saved one.")
    return folder


def refuse_run(checkpoint: Path | None, mend: str) -> None:
    """Refuse a run's folder where one of its checkpoints is meant.

    Args:
        checkpoint: what --checkpoint names; None: nothing.
        mend: what to do for the newest.

    Raises:
        ConfigError: it is a run's folder.
    """
    if checkpoint is not None and (checkpoint / "checkpoints").is_dir():
        raise ConfigError(
            f"--checkpoint: {checkpoint} is the folder of a run; {mend}, or name one of the folders in "
            f"{checkpoint / 'checkpoints'}."
        )


def add_model_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Arguments that `load_source` reads; returns the group of sources, one of which must be given."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=user_path, help="output folder of a run, which may go on; its newest checkpoint is taken"
    )
    source.add_argument("--checkpoint", type=user_path, help="one checkpoint folder")
    source.add_argument("--adapter", type=model_path, help="a PEFT adapter, LongLoRA's two files, or a name of the Hub")
    parser.add_argument("--base", type=model_path, help="where the base model lies, if it moved since training")
    parser.add_argument("--context", type=int, help="tokens of the result, where the --adapter's files do not tell")
    parser.add_argument("--rope", choices=ROPE_TYPES, help="stretching, likewise; auto is the base's own or linear")
    parser.add_argument("--factor", type=float, help="stretch over the original context, likewise")
    parser.add_argument("--theta", type=float, help="RoPE base of --rope abf or ntk, likewise")
    parser.add_argument(
        "--original-context", type=int, help="tokens before any stretching, where neither the base nor the run tells"
    )
    parser.add_argument("--strength", type=strength, default=1.0, help=STRENGTH)
    return source


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `load_source` and `finish` read."""
    add_model_arguments(parser)
    parser.add_argument("--output", type=user_path, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --output")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every tensor and the logits of the result (default on)",
    )
    parser.add_argument("--push", metavar="ORG/NAME", help="also upload it to this repository (new: private)")


def load_source(options: argparse.Namespace) -> tuple[TrainedModel, str]:
    """The trained model, and what to call it.

    Raises:
        CheckpointError, ConfigError: see `load_trained_model` and `load_adapter`.
    """
    try:
        model, name = _load(options)
        return part_way(model, options.strength), name if options.strength == 1 else f"{options.strength:g} of {name}"
    except ConfigError as error:
        raise ConfigError(in_options(str(error))) from None


def in_options(sentence: str) -> str:
    """An error about a run's settings in words of this command line, which knows no YAML."""
    for setting, option in SETTINGS.items():
        sentence = sentence.replace(setting, option)
    return re.sub(r"\btype: (\w+)", r"--rope \1", sentence)


def _load(options: argparse.Namespace) -> tuple[TrainedModel, str]:
    stretch = {"factor": options.factor, "theta": options.theta, "original_context": options.original_context}
    if options.adapter is not None:
        given = options.rope is not None or any(value is not None for value in stretch.values())
        rope = RopeSettings(type=options.rope or "auto", **stretch) if given else None
        return load_adapter(options.adapter, options.base, options.context, rope), str(options.adapter)
    superfluous = [f"--{name}" for name in ("context", "rope", "factor", "theta") if getattr(options, name) is not None]
    if superfluous:
        raise CheckpointError(f"{' and '.join(superfluous)}: a checkpoint tells this; give it with --adapter only.")
    refuse_run(options.checkpoint, f"give --run {options.checkpoint}")
    for last in (False, True):
        checkpoint = options.checkpoint or find_checkpoint(options.run)
        try:
            return load_trained_model(checkpoint, options.base, options.original_context), checkpoint.name
        except CheckpointError:
            # A run that goes on may have saved anew and deleted this one meanwhile.
            if last or options.run is None or find_checkpoint(options.run) == checkpoint:
                raise
    raise AssertionError("not reached")


def warn_of(model: TrainedModel) -> None:
    """Print what may not be meant of a loaded source."""
    for warning in (*model.warnings, *map(in_options, replacement_warning(read_arch(model.base), model.rope))):
        print(f"warning: {warning}", file=sys.stderr)


def finish(options: argparse.Namespace, form: str, embedding: str = "whole") -> None:
    """Load, export, verify, and print what came of it.

    Raises:
        CheckpointError, ConfigError: one sentence each.
    """
    destination = Destination(options.push) if options.push is not None else None
    model, name = load_source(options)
    warn_of(model)
    export(model, options.output, form, options.force, embedding, shown=True)
    print(f"{options.output}: {form} of {name}, context {model.context}")
    if options.verify:
        # transformers and peft take seconds to import; a plain export does without.
        from pipeline.export.verify import verify

        report = verify(model, options.output, form)
        tensors = report["tensors"]
        print(
            f"verified ({report['mode']}): {tensors['bit_equal']} tensors bit-equal, {tensors['recomputed']} computed "
            f"again; logits differ by at most {report['max_abs_logit_difference']:.3g}; see {options.output / REPORT}"
        )
        if "rounding" in report:
            print(report["rounding"]["sentence"])
    if destination is not None:
        print(f"uploaded: {destination.upload(options.output)}")
