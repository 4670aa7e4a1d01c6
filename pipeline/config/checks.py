"""Checks of a setting's value, for the sections of the configuration."""

from __future__ import annotations

from parallel.errors import ConfigError


def one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(allowed)}.")


def at_least(where: str, value: float, low: float) -> None:
    """Raise ConfigError unless `value` >= `low`."""
    if not value >= low:
        raise ConfigError(f"{where}: must be at least {low}, got {value}.")


def between(where: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `low` <= `value` <= `high`."""
    if not low <= value <= high:
        raise ConfigError(f"{where}: must lie in [{low}, {high}], got {value}.")


def not_empty(where: str, value: str | None) -> None:
    """Raise ConfigError for a text that is there and empty: as a path it would mean the current folder."""
    if value is not None and not value.strip():
        raise ConfigError(f"{where}: is empty; give a name, or remove it where it is optional.")
