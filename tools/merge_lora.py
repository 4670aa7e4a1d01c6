"""Merge an adapter into its base: `longspan merge --adapter DIR --base BASE --output OUT [--context N]`.

DIR is a PEFT adapter, LongLoRA's two files (`trainable_params` beside `adapter_model`), or, with --checkpoint or --run,
a Longspan checkpoint. The result is a plain Hugging Face model in the base's dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.sources import add_source_arguments, finish


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser("tools.merge_lora", __doc__, "HUGGING_FACE.md")
    add_source_arguments(parser)
    options = parser.parse_args(arguments)
    finish(options, "merged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
