"""Small JSON files: read with one sentence for whatever is wrong with them, written as people and version control like
them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from pipeline.storage.durable import replace_text
from pipeline.storage.lfs import refuse_pointer

_BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, is no UTF-8, no JSON or no object, or starts with a byte order mark, which
            transformers does not read either.
    """
    mend = "copy or download it again"
    refuse_pointer(path)
    try:
        data = path.read_bytes()
        if data.startswith(_BOMS):
            raise CheckpointError(f"{path}: starts with a byte order mark; save it as UTF-8 without one.")
        found = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); {mend}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: does not hold a JSON object; {mend}.")
    return found


def replace_json(path: Path, content: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write JSON in one step, durably, with the folder it lies in; OSError if the disk refuses.

    Raises:
        ValueError: a number is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
