"""The small files of a model folder: JSON, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files beside the weights that belong to a model and are copied with it."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path, context: int | None = None) -> None:
    """Copy tokenizer and generation files that exist; raise the tokenizer's length limit to `context` where it is
    lower."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    if context is not None and path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings.get("model_max_length"), int) and settings["model_max_length"] < context:
            write_json(path, {**settings, "model_max_length": context})
