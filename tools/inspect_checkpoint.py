"""What a checkpoint holds, where, and whether it is whole; or how two differ. No GPU, no torch: fit for a laptop.

    longspan inspect runs/7b-32k                       # newest whole checkpoint of a run, all listed
    longspan inspect runs/7b-32k/checkpoints/step-000120 --tensors
    longspan inspect A --diff B

Exit code 0; 1 if a checkpoint is damaged, or with --diff if the two differ; 2 if there is none.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from parallel.errors import CheckpointError, LongspanError
from pipeline.checkpoint.choose import candidates, newest
from pipeline.checkpoint.compatibility import flatten
from pipeline.checkpoint.manifest import FIELDS, MANIFEST, Manifest, read_manifest
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.paths import user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.reporting.words import counted


def find(path: Path) -> Path:
    """The checkpoint folder a path means: itself, or the newest whole one of a run.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).exists():
        return path
    for folder in (path / "checkpoints", path):
        if candidates(folder) and (found := newest(folder)) is not None:
            return found
    raise CheckpointError(f"{path}: is no checkpoint and holds none; give a run's output folder or a step folder.")


def kind_of(name: str) -> str:
    """Which trainable kind a canonical name belongs to."""
    if ".lora_" in name:
        return "lora"
    if "norm" in name:
        return "norm"
    return "embed" if "embed" in name else "lm_head" if name.startswith("lm_head") else "other"


def facts(manifest: Manifest) -> dict[str, str]:
    """What a reader asks first, in words."""
    raw, kinds = manifest.raw, dict[str, int]()
    for name, entry in manifest.tensors.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + math.prod(entry.shape)
    elements = sum(kinds.values())
    return {
        "folder": str(manifest.folder),
        "format": str(manifest.format),
        "step": f"{manifest.step} ({manifest.updates} updates applied)",
        "saved": str(raw.get("saved_at", "not told")),
        "written by": ", ".join(f"{key} {value}" for key, value in (manifest.layout or {}).items()) or "not told",
        "base": f"{raw.get('base')} (hash {str(raw.get('base_hash'))[:16]})",
        "data": f"fingerprint {str(raw.get('data_fingerprint'))[:16]}, cursor {raw.get('cursor')}",
        "guard": str(raw.get("guard")),
        "versions": ", ".join(f"{name} {version}" for name, version in raw.get("versions", {}).items()) or "not told",
        "trained": f"{elements:,} parameters in {counted(len(manifest.tensors), 'tensor')}: "
        + ", ".join(f"{kind} {count:,}" for kind, count in sorted(kinds.items())),
        "files": f"{len(manifest.files)}, {sum(file.bytes for file in manifest.files.values()):,} bytes",
    }


def show(manifest: Manifest, console: Console, tensors: bool) -> None:
    """Print facts, files and, if asked, every tensor with its pieces."""
    for key, value in facts(manifest).items():
        console.print(f"{key:>10}  {value}", markup=False, highlight=False, soft_wrap=True)
    table = Table("file", "bytes", "sha256")
    for name, file in sorted(manifest.files.items()):
        table.add_row(name, f"{file.bytes:,}", file.sha256[:16])
    console.print(table)
    if tensors:
        table = Table("tensor", "shape", "pieces")
        for name, entry in manifest.tensors.items():
            pieces = [f"{p.trained_file} {list(p.cut) if p.cut else 'all'} {p.start}:{p.stop}" for p in entry.pieces]
            table.add_row(name, str(list(entry.shape)), "\n".join(pieces))
        console.print(table)


def verify(reader: CheckpointReader, console: Console) -> None:
    """Compare every checksum, with a bar; raises Damaged."""
    total = sum(file.bytes for file in reader.manifest.files.values())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checksums", total=total)
        reader.verify(lambda count: progress.advance(task, count))
    console.print(
        f"whole: {counted(len(reader.manifest.files), 'file')}, {total:,} bytes match their checksums", highlight=False
    )


def difference(one: CheckpointReader, other: CheckpointReader) -> list[str]:
    """A line for everything that is not alike: declarations, tensors, values."""
    lines = []
    sides: list[dict[str, Any]] = []
    for reader in (one, other):
        raw = {k: v for k, v in reader.manifest.raw.items() if k not in ("files", "tensors", "saved_at")}
        sides.append(flatten(raw))
    for key in sorted(sides[0].keys() | sides[1].keys()):
        left, right = (side.get(key) for side in sides)
        if left != right:
            lines.append(f"{key}: {json.dumps(left)} | {json.dumps(right)}")
    mine, theirs = one.manifest.tensors, other.manifest.tensors
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            lines.append(f"{name}: only in {(one if name in mine else other).manifest.folder}")
            continue
        if mine[name].shape != theirs[name].shape:
            lines.append(f"{name}: shape {list(mine[name].shape)} | {list(theirs[name].shape)}")
            continue
        for field in FIELDS:
            a, b = one.whole(name, field).astype(np.float64), other.whole(name, field).astype(np.float64)
            if not np.array_equal(a, b, equal_nan=True):
                relative = np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-300)
                count = int((a != b).sum())
                lines.append(f"{name} {field}: {count:,} of {a.size:,} elements differ, relative {relative:.3g}")
    return lines


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser("tools.inspect_checkpoint", __doc__, "STATE.md")
    parser.add_argument("path", type=user_path, help="output folder of a run, or a step folder")
    parser.add_argument("--diff", type=user_path, metavar="OTHER", help="compare with this one, values included")
    parser.add_argument("--tensors", action="store_true", help="list every tensor and where its pieces lie")
    parser.add_argument("--no-verify", action="store_true", help="do not read the files to compare checksums")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON instead")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        with CheckpointReader(find(options.path)) as reader:
            if options.diff is not None:
                with CheckpointReader(find(options.diff)) as other:
                    lines = difference(reader, other)
                for line in lines or ["no difference"]:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                return int(bool(lines))
            if options.json:
                print(json.dumps(facts(read_manifest(reader.manifest.folder))))
            else:
                show(reader.manifest, console, options.tensors)
            if not options.no_verify:
                verify(reader, Console(stderr=True) if options.json else console)
    except LongspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if (options.path / MANIFEST).exists() else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
