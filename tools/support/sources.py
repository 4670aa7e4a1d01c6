"""Where an export's trained tensors come from, as command-line arguments: a run, a checkpoint or an adapter folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from parallel.errors import CheckpointError
from pipeline.checkpoint.choose import newest
from pipeline.config.rope import RopeSettings
from pipeline.export.adapter_read import load_adapter
from pipeline.export.formats import export
from pipeline.export.trained_model import TrainedModel, load_trained_model
from pipeline.hf.writer import REPORT


def find_checkpoint(run: Path) -> Path:
    """Newest checkpoint of a run's output folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = newest(run / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{run}: holds no checkpoint; give the output folder of a run that has saved one.")
    return folder


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `load_source` and `finish` read."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=Path, help="output folder of a run, which may go on; its newest checkpoint is taken"
    )
    source.add_argument("--checkpoint", type=Path, help="one checkpoint folder")
    source.add_argument("--adapter", type=Path, help="a PEFT adapter, or LongLoRA's two files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--base", type=Path, help="where the base model lies, if it moved since training")
    parser.add_argument("--context", type=int, help="tokens of the result, where the --adapter's files do not tell")
    parser.add_argument("--rope", choices=("linear", "yarn", "ntk", "llama3", "none"), help="stretching, likewise")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --output")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every tensor and the logits of the result (default on)",
    )


def load_source(options: argparse.Namespace) -> tuple[TrainedModel, str]:
    """The trained model, and what to call it.

    Raises:
        CheckpointError, ConfigError: see `load_trained_model` and `load_adapter`.
    """
    if options.adapter is not None:
        rope = RopeSettings(type=options.rope) if options.rope else None
        return load_adapter(options.adapter, options.base, options.context, rope), str(options.adapter)
    if options.context is not None or options.rope is not None:
        raise CheckpointError("--context and --rope: a checkpoint tells both; give them with --adapter only.")
    for last in (False, True):
        checkpoint = options.checkpoint or find_checkpoint(options.run)
        try:
            return load_trained_model(checkpoint, options.base), checkpoint.name
        except CheckpointError:
            # A run that goes on may have saved anew and deleted this one meanwhile.
            if last or options.run is None or find_checkpoint(options.run) == checkpoint:
                raise
    raise AssertionError("not reached")


def finish(options: argparse.Namespace, form: str, embedding: str = "whole") -> None:
    """Load, export, verify, and print what came of it.

    Raises:
        CheckpointError, ConfigError: one sentence each.
    """
    model, name = load_source(options)
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
