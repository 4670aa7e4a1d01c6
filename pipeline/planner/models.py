"""The model a plan is for: a published name, a hub's config.json, or a checkpoint folder."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import CheckpointError, ConfigError
from pipeline.planning.arch import LlamaArch, parse_arch, read_arch
from pipeline.storage.json_file import read_object

MODELS = Path(__file__).with_name("models.yaml")


@dataclass(frozen=True)
class Model:
    """A model's sizes, and what a YAML's `model.path` is to say."""

    name: str
    path: str
    """Of the checkpoint; for a published name where `hf download` would put it below models/."""
    arch: LlamaArch


@cache
def _published() -> dict[str, dict[str, Any]]:
    listed: dict[str, dict[str, Any]] = yaml.safe_load(MODELS.read_text(encoding="utf-8"))
    return {name: values for name, values in listed.items() if not name.startswith("_")}


def model_names() -> tuple[str, ...]:
    """The published models that need no file."""
    return tuple(_published())


def find_model(text: str) -> Model:
    """The model that `--model` names.

    Args:
        text: one of `model_names`, in any case; a hub's id of one; a config.json; or a folder that has one.

    Raises:
        ConfigError: it is none of these, or the model is not supported.
    """
    listed = _published()
    wanted = text.strip().lower()
    by_hub = {str(values["hub"]).lower(): name for name, values in listed.items()}
    name = by_hub.get(wanted, wanted)
    if name in listed:
        hub = str(listed[name]["hub"])
        return Model(name, f"models/{hub.rsplit('/', 1)[-1]}", parse_arch(listed[name], Path(hub) / "config.json"))
    path = Path(text).expanduser()
    if path.is_dir():
        return Model(path.resolve().name, str(path), read_arch(path))
    if path.is_file():
        try:
            values = read_object(path)
        except CheckpointError as error:
            raise ConfigError(f"--model: {error}") from None
        return Model(path.stem, str(path.parent), parse_arch(values, path))
    # A checkpoint folder that is not there yet, by the name a hub gives it.
    by_folder = {str(values["hub"]).rsplit("/", 1)[-1].lower(): name for name, values in listed.items()}
    if path.name.lower() in by_folder:
        return replace(find_model(by_folder[path.name.lower()]), path=text)
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.5) or list(listed)
    raise ConfigError(
        f"--model: {text} is neither a file or folder nor a model known by name (nearest: {', '.join(near)}); give the "
        "config.json of its checkpoint."
    )
