"""Write what docs/ says of the code from the code: SETTINGS.md, the import graph in ARCHITECTURE.md, and pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import ConfigError
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.import_graph import graph_section
from tools.support.pictures import PICTURES
from tools.support.settings_page import settings_page

ROOT = Path(__file__).parents[1]
SETTINGS, ARCHITECTURE = Path("docs/SETTINGS.md"), Path("docs/ARCHITECTURE.md")
IMAGES = Path("docs/images")
BEGIN, END = "<!-- python -m tools.pages: begin -->", "<!-- python -m tools.pages: end -->"
"""What lies between these lines of docs/ARCHITECTURE.md is written here."""


def pages(root: Path) -> dict[Path, str]:
    """The text of every page, by its path below `root`.

    Raises:
        ConfigError: docs/ARCHITECTURE.md has no place for the graph.
    """
    text = (root / ARCHITECTURE).read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ConfigError(f"{ARCHITECTURE}: the lines {BEGIN} and {END} are missing; put them where the graph belongs.")
    graph = f"{before}{BEGIN}\n\n{graph_section(root)}\n\n{END}{after}"
    drawn = {IMAGES / name: draw() for name, draw in PICTURES.items()}
    return {SETTINGS: settings_page(), ARCHITECTURE: graph} | drawn


def stale(root: Path) -> list[Path]:
    """Pages that are missing or say something else than the code does."""
    return [
        path
        for path, text in pages(root).items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
    ]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 with --check when a page is not what the code says."""
    parser = Parser("tools.pages", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    args = parser.parse_args(argv)
    found = stale(ROOT)
    for path in found:
        if not args.check:
            (ROOT / path).write_text(pages(ROOT)[path], encoding="utf-8")
        print(f"{path}: {'is out of date; run python -m tools.pages' if args.check else 'written'}")
    return 1 if found and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
