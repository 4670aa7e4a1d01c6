"""Export a trained checkpoint: `python -m tools.export_hf --run RUN --output DIR --format adapter|merged`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import CheckpointError, LongspanError
from pipeline.checkpoint.choose import newest
from pipeline.export import FORMATS, export, load_trained_model


def find_checkpoint(run: Path) -> Path:
    """Newest checkpoint of a run's output folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = newest(run / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{run}: holds no checkpoint; give the output folder of a run that has saved one.")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Export a trained checkpoint as a PEFT adapter or a merged model.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="output folder of a run; its newest checkpoint is exported")
    source.add_argument("--checkpoint", type=Path, help="one checkpoint folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--format", choices=FORMATS, default="adapter", dest="form")
    parser.add_argument("--base", type=Path, help="where the base model lies, if it moved since training")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --output")
    parser.add_argument("--no-verify", action="store_true", help="do not reload the result and compare logits")
    options = parser.parse_args(arguments)
    try:
        checkpoint = options.checkpoint or find_checkpoint(options.run)
        model = load_trained_model(checkpoint, options.base)
        export(model, options.output, options.form, options.force)
        print(f"{options.output}: {options.form} of {checkpoint.name}, context {model.context}")
        if not options.no_verify:
            # transformers and peft take seconds to import; a plain export does without.
            from pipeline.verify import verify

            report = verify(model, options.output, options.form)
            print(f"verified: logits differ by at most {report['max_abs_logit_difference']:.3g}")
    except LongspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
