"""Paths as a user writes them: `~/x`, `$SCRATCH/x`. The one place where they become paths of this machine. No torch."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Annotated

from parallel.errors import ConfigError
from pipeline.config.hub import DATASET, MODEL, local_folder

EXPANDED = "expanded"
PathText = Annotated[str, EXPANDED]
"""A setting of the configuration that is a path: `yaml_file` expands it."""
ModelText = Annotated[str, EXPANDED, MODEL]
DatasetText = Annotated[str, EXPANDED, DATASET]
"""Paths, or names of the Hugging Face Hub: `yaml_file` puts the folder they were downloaded to in their place."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w*)\})")


def expand(text: str) -> str:
    """Replace a leading `~` or `~name` and every `$NAME` and `${NAME}`, once.

    Raises:
        ConfigError: a variable is not set or empty (`$X/run` would be /run), or a home folder is not known.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2] or ""
        found = os.environ.get(name)
        if not found:
            state = "is not set" if found is None else "is empty"
            raise ConfigError(f"{text}: the environment variable {name!r} {state}; set it, or write the path out.")
        return found

    home, slash, rest = text.partition("/")
    if home.startswith("~"):
        known = os.path.expanduser(home)
        if known == home or (home == "~" and os.environ.get("HOME") == ""):
            raise ConfigError(f"{text}: no home folder is known for {home}; set HOME, or write the path out.")
        home = known
        return home + slash + _VARIABLE.sub(value, rest)
    return _VARIABLE.sub(value, text)


def user_path(text: str) -> Path:
    """An `argparse` type: a path argument, expanded."""
    try:
        return Path(expand(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_path(text: str) -> Path:
    """An `argparse` type: a Hugging Face folder, expanded, or a name of the Hub that was downloaded."""
    return _of_hub(text, MODEL)


def dataset_path(text: str) -> Path:
    """An `argparse` type: files or a pattern of them, expanded, or a data set of the Hub that was downloaded."""
    return _of_hub(text, DATASET)


def _of_hub(text: str, kind: str) -> Path:
    try:
        return Path(local_folder(expand(text), kind))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
