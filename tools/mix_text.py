"""Mix long text with program code and with notes that it refers back to: `longspan mix-text --input BOOKS ...`

Books alone make a model forget what it knew of numbers and of questions; docs/RECIPES.md says what a mixture keeps.
The folder that is written is text, which `data.path` can name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.config.paths import user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.mixture import Mixture, write_mixture


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on standard error."""
    parser = Parser("tools.mix_text", __doc__, "RECIPES.md")
    parser.add_argument("--input", type=user_path, required=True, help="text or JSON lines, as data.path takes it")
    parser.add_argument("--output", type=user_path, required=True, help="folder to write")
    parser.add_argument("--code", type=float, default=0.2, help="share of characters (default: %(default)s; 0: none)")
    parser.add_argument(
        "--notes", type=int, default=6000, metavar="N", help="characters between two (default: %(default)s; 0: none)"
    )
    parser.add_argument("--code-folder", type=user_path, help="Python code (default: Python's standard library)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    args = parser.parse_args(argv)
    counts = write_mixture(args.input, args.output, Mixture(args.code, args.notes, args.seed), args.code_folder)
    print(f"{args.output}: {counts['text']:,} characters of text and notes, {counts['code']:,} of code")
    return 0


if __name__ == "__main__":
    sys.exit(main())
