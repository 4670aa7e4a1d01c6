"""Export a checkpoint or adapter as a PEFT adapter, a merged model or LongLoRA's two files: `longspan export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.export.adapter_write import EMBEDDINGS
from pipeline.export.formats import FORMATS
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.sources import add_source_arguments, finish


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser("tools.export_hf", __doc__, "HUGGING_FACE.md")
    add_source_arguments(parser)
    parser.add_argument("--format", choices=FORMATS, default="adapter", dest="form")
    parser.add_argument(
        "--embedding",
        choices=EMBEDDINGS,
        default="whole",
        help="in a PEFT adapter: whole (modules_to_save), only changed rows (trainable_token_indices), or as fits",
    )
    options = parser.parse_args(arguments)
    finish(options, options.form, options.embedding)
    return 0


if __name__ == "__main__":
    sys.exit(main())
