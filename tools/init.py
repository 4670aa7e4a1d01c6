"""Write the shipped YAML files, cluster jobs and the demo's text into a folder: `longspan init [FOLDER]`.

They lie there under launch/, where the YAML files and the documentation look for them. Files that are there already
are kept.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import ConfigError
from pipeline.config.paths import user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser

SHIPPED = Path(__file__).parents[1] / "launch"
PARTS = ("configs", "demo", "slurm.sbatch", "kubernetes.yaml", "kubernetes_trainjob.yaml", "skypilot.yaml", "nccl.env")


def write(folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy what is shipped into `folder`/launch; returns the files written, and those that were there and differ.

    Raises:
        ConfigError: it is the folder they are copied from.
        OSError: a file cannot be written.
    """
    target = folder / "launch"
    if target.exists() and target.samefile(SHIPPED):
        raise ConfigError(f"{folder}: is the repository, which has them; give another folder.")
    written, kept = [], []
    parts = [SHIPPED / part for part in PARTS]
    for source in sorted(path for part in parts for path in (part, *part.rglob("*")) if path.is_file()):
        path = target / source.relative_to(SHIPPED)
        if path.exists():
            if path.read_bytes() != source.read_bytes():
                kept.append(path)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        written.append(path)
    return written, kept


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence."""
    parser = Parser("tools.init", __doc__)
    parser.add_argument("folder", type=user_path, nargs="?", default=Path("."), help="default: where you stand")
    folder = parser.parse_args(argv).folder
    written, kept = write(folder)
    for path in written:
        print(path)
    for path in kept:
        print(f"{path}: is there already and differs; kept.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
