"""Installed versions of what a run's numbers depend on. No torch."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "peft", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Package -> version; what is not installed is left out."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        if (version := installed(package)) is not None:
            found[package] = version
    return found


def installed(package: str) -> str | None:
    """A package's version; None: it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
