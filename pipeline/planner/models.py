"""The model a plan is for: a published name, a hub's config.json, or a checkpoint folder."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.hub import MODEL, local_folder, not_there
from pipeline.planning.arch import LlamaArch, parse_arch, read_arch
from pipeline.storage.json_file import read_object

MODELS = Path(__file__).with_name("models.yaml")


MOST_LAYERS = 1024
"""Of a model that is planned for: the time to plan grows with them."""


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


def _by_folder(path: Path) -> str | None:
    """The published model whose folder on a hub has this path's name."""
    folders = {str(values["hub"]).rsplit("/", 1)[-1].lower(): name for name, values in _published().items()}
    return folders.get(path.name.lower())


def published_config(path: Path) -> dict[str, Any] | None:
    """What config.json says of the model that a hub's folder of this name holds; None: it is not known here."""
    name = _by_folder(path)
    return None if name is None else {key: value for key, value in _published()[name].items() if key != "hub"}


def find_model(text: str) -> Model:
    """See `_find`, whose arguments and errors it has; models that nobody has trained are told as well."""
    model = _find(text)
    if model.arch.layers > MOST_LAYERS:
        raise ConfigError(
            f"--model: {model.name} has {model.arch.layers} layers; at most {MOST_LAYERS} are planned for."
        )
    return model


def _find(text: str) -> Model:
    """The model that `--model` names.

    Args:
        text: one of models.yaml, in any case; a hub's id of one, or of what was downloaded; a config.json; or a folder
            that has one.

    Raises:
        ConfigError: it is none of these, or the model is not supported.
    """
    if not text.strip():
        raise ConfigError("--model: is empty; name a model, a config.json, or a checkpoint folder.")
    listed = _published()
    wanted = text.strip().lower()
    by_hub = {str(values["hub"]).lower(): name for name, values in listed.items()}
    name = by_hub.get(wanted, wanted)
    if name in listed:
        hub = str(listed[name]["hub"])
        return Model(name, f"models/{hub.rsplit('/', 1)[-1]}", parse_arch(listed[name], Path(hub) / "config.json"))
    place = local_folder(text, MODEL)
    path = Path(place).expanduser()
    if path.is_dir():
        # A name of the Hub stays one: in its cache the folder is called by a hash.
        named = path if place == text else Path(text)
        return Model(named.resolve().name, str(path) if place == text else text, read_arch(path))
    if path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise ConfigError(f"--model: {text} is no config.json; of a run's YAML the option is --config.")
        try:
            values = read_object(path)
        except CheckpointError as error:
            raise ConfigError(f"--model: {error}") from None
        return Model(path.stem, str(path.parent), parse_arch(values, path))
    # A checkpoint folder that is not there yet, by the name a hub gives it.
    by_folder = _by_folder(path)
    if by_folder is not None:
        return replace(find_model(by_folder), path=text)
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.5)
    known = f"nearest: {', '.join(near)}" if near else f"these are: {', '.join(listed)}"
    hub = not_there(text, MODEL)
    raise ConfigError(
        f"--model: {text} is neither a file or folder nor a model known by name ({known}); give the "
        f"config.json of its checkpoint{hub}."
    )
