"""Whether a run may go on from a checkpoint: the same base model, the same data, the same mathematics. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.errors import CheckpointError, ConfigError
from pipeline.checkpoint.manifest import Manifest
from pipeline.config import defaults

FREE_TO_CHANGE = (
    "output",
    "save.",
    "eval.",
    "parallel.",
    "train.steps",
    "train.micro_batch",
    "train.recompute",
    "train.bad_steps",
    "checks",
    "attention.backend",
    "attention.full_last_steps",
    "data.cache",
    "data.path",
    "data.tokenizer",
    "model.path",
)
"""Settings a resumed run may change: where things live and how fast they run, never what is computed. The data and the
base model are compared by content (fingerprint, base hash), so that a folder may move."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested config dict."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def check_cursor(manifest: Manifest) -> None:
    """Refuse a checkpoint whose place in the data is not that of its step: the order is a function of seed and step.

    Raises:
        CheckpointError: the two disagree.
    """
    cursor = manifest.raw.get("cursor")
    if manifest.format > 1 and cursor != data_cursor(manifest.step, manifest.raw["config"]):
        raise CheckpointError(
            f"{manifest.folder}: its data cursor {cursor} is not that of step {manifest.step}; resume from another one."
        )


def data_cursor(step: int, config: Mapping[str, Any]) -> dict[str, int]:
    """What is read of the data after `step` steps: sequences in all."""
    return {"step": step, "sequences": step * int(config["train"]["global_batch"])}


def check_resumable(manifest: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue a run under settings that change what is computed.

    A setting the checkpoint's release did not know yet had the effect of its default.

    Args:
        manifest: of the checkpoint; holds `config` (nested), `base_hash`, `data_fingerprint`.
        current: the same three keys for this run.

    Raises:
        ConfigError: names the first setting that differs, both values, and the way out.
    """
    for key, noun in (("base_hash", "base model"), ("data_fingerprint", "training data")):
        if manifest.get(key) != current[key]:
            raise ConfigError(
                f"Resume: the {noun} is not the one the checkpoint was trained on ({key} differs); restore it, or "
                "choose another output folder."
            )
    old, new = (defaults() | flatten(side["config"]) for side in (manifest, current))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE):
            raise ConfigError(
                f"Resume: {key} was {old.get(key)!r} in the checkpoint and is {new.get(key)!r} now, which changes what "
                "is computed; restore it, or choose another output folder."
            )
    if old.get("train.schedule") == "cosine" and old.get("train.steps") != new.get("train.steps"):
        raise ConfigError(
            f"Resume: train.steps was {old['train.steps']} and is {new['train.steps']} now, which bends a cosine "
            "schedule half-way; keep it, or choose another output folder."
        )
