"""Make questions from prose, their passage far above: `longspan make-questions --input BOOKS --output FILE`.

Writes conversations that `tools.prepare_data --chat` takes; `tools.answer_questions` judges a model by them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from pipeline.config.paths import user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.reporting.words import counted
from pipeline.storage.durable import replace_text
from tools.support.questions import questions


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on standard error."""
    parser = Parser("tools.make_questions", __doc__)
    parser.add_argument("--input", type=user_path, required=True, help="text, as data.path takes it")
    parser.add_argument("--output", type=user_path, required=True, help=".jsonl file to write")
    parser.add_argument("--count", type=int, default=200, help="questions (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=1500, help="of a passage (default: %(default)s)")
    parser.add_argument("--each", type=int, default=1, help="questions on one passage, at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    args = parser.parse_args(argv)
    made = questions(args.input, args.count, args.characters, args.seed, args.each)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(args.output, "".join(json.dumps(each.record(), ensure_ascii=False) + "\n" for each in made))
    longest = max((len(each.passage) for each in made), default=0)
    print(f"{args.output}: {counted(len(made), 'question')}, the longest passage {counted(longest, 'character')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
