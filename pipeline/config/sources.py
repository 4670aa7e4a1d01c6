"""The sources of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import ConfigError
from pipeline.config.checks import not_empty, within
from pipeline.config.paths import DatasetText


@dataclass(frozen=True)
class SourceConfig:
    """One of several that training draws from."""

    path: DatasetText
    """As `data.path`."""
    weight: float | None = None
    """Share of the training windows, against the other sources' weights; None: as `epochs` makes it."""
    epochs: float | None = None
    """How often it is read while a source of epochs 1 is read once; None: 1."""

    def __post_init__(self) -> None:
        not_empty("data.path", self.path)
        for name, value in (("weight", self.weight), ("epochs", self.epochs)):
            if value is not None and not value > 0:
                raise ConfigError(
                    f"data.path: {self.path} has {name} {value:g}; give it more than 0, or remove the source."
                )
        if self.weight is not None and self.epochs is not None:
            raise ConfigError(
                f"data.path: {self.path} has a weight and epochs, which both say how often it is read; remove one."
            )


def check_sources(sources: tuple[SourceConfig, ...]) -> None:
    """Refuse sources that contradict or hold each other."""
    if not sources:
        raise ConfigError("data.path: an empty list names nothing to train on; give it sources, or one path.")
    weighted = [one.path for one in sources if one.weight is not None]
    others = [one.path for one in sources if one.weight is None]
    if weighted and others:
        raise ConfigError(
            f"data.path: {weighted[0]} has a weight and {others[0]} has none; give all sources a weight, or none (then "
            "epochs and their sizes count)."
        )
    for number, one in enumerate(sources):
        for other in sources[:number]:
            inside, around = within(one.path, other.path), within(other.path, one.path)
            if inside and around:
                raise ConfigError(f"data.path: {one.path} is there twice; name it once.")
            if inside or around:
                raise ConfigError(
                    f"data.path: {other.path} and {one.path} overlap, so text would count twice; name what they share "
                    "once."
                )
