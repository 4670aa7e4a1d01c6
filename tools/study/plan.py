"""Recipes, and what each makes of a run's configuration. No torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import config_dict, load_config
from tools.support.mixture import Mixture

VERSION = 1
"""Of what a result means: another one is not taken over."""
_NOT_DECISIVE = ("output", "save", "eval", "checks")
"""Sections of a run that do not decide what is trained."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """One way to extend a model."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    """(dotted key, value) over the study's own."""
    untrained: bool = False
    """Only the RoPE settings count."""
    stretch: float | None = None
    """Context over the base's own; None: the study's."""
    mix: Mixture = Mixture()
    """What is mixed with the training text."""
    whole: bool = False
    """Every weight is trained, in transformers' model by torch (`whole_model`): what adapters are compared with."""
    seconds: float | None = None
    """As many steps as take so long (see `pace`); None: `seconds_of`, or the configuration's steps."""
    seconds_of: str | None = None
    """As many steps as take as long as all of this recipe's; None: see `seconds`."""
    of: str | None = None
    """Not trained itself: this recipe with less of its training left (`strength`); None: trained."""
    strength: float = 1.0
    """Of the way from the base's weights to the trained ones."""

    @property
    def budgeted(self) -> bool:
        """Whether its steps follow from a time."""
        return self.seconds is not None or self.seconds_of is not None


@dataclass(frozen=True)
class Asked:
    """What every model is judged by; lengths are in units of the base's own context."""

    lengths: tuple[float, ...] = (0.25, 1.0, 2.0, 4.0)
    """Of perplexity."""
    retrieval_lengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    tasks: tuple[str, ...] = ("passkey",)
    windows: int = 6
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 4
    digits: int = 5
    filler: str = "grass"
    tail: float = 0.25
    ruler: tuple[str, ...] = ()
    """RULER's tasks by name, or `ruler`: all; empty: none."""
    ruler_lengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    ruler_trials: int = 4
    """Prompts a task and length."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value, many = getattr(self, item.name), isinstance(item.default, tuple)
            kind: tuple[type, ...] = (str,) if item.name in ("tasks", "filler", "ruler") else (int, float)
            if item.name in ("windows", "trials", "digits", "ruler_trials"):
                kind = (int,)
            parts = value if many and isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) != many or any(type(part) not in kind for part in parts):
                what = {str: "text", int: "a whole number", float: "a number"}[kind[-1]]
                raise ConfigError(f"judge.{item.name}: {value!r} is not {'a list, each ' if many else ''}{what}.")
        if not self.lengths or not self.retrieval_lengths or (self.ruler and not self.ruler_lengths):
            raise ConfigError("judge: lengths, retrieval_lengths and ruler_lengths must name at least one length.")
        if self.windows < 1:
            raise ConfigError(f"judge.windows: must be at least 1, got {self.windows}.")
        if not all(0 < length < math.inf for length in self.lengths):
            raise ConfigError(f"judge.lengths: {list(self.lengths)} are not all lengths; give numbers above 0.")
        if not 0 <= self.tail < max(self.lengths):
            raise ConfigError(f"judge.tail: must be from 0 to below the longest of judge.lengths, got {self.tail}.")


def with_own_steps(recipes: Sequence[Recipe]) -> list[str]:
    """Names of recipes whose training time others may take."""
    return [recipe.name for recipe in recipes if not (recipe.untrained or recipe.budgeted or recipe.of)]


@dataclass(frozen=True)
class Study:
    """Recipes, and what they share."""

    stretch: float
    """Context wanted over the base's own."""
    seeds: tuple[int, ...]
    common: tuple[tuple[str, Any], ...]
    """(dotted key, value) of every run."""
    recipes: tuple[Recipe, ...]
    """The most valuable first."""
    judge: Asked
    every: tuple[Recipe, ...]
    """Also those that are left out, by which others are paced."""

    def in_seconds_of(self, name: str) -> Study:
        """The same study, and after it each trained recipe again in the seconds of one of them.

        Raises:
            ConfigError: it is no recipe with steps of its own.
        """
        paces = with_own_steps(self.every)
        if name not in paces:
            raise ConfigError(
                f"--equal-seconds: {name!r} is no recipe with steps of its own; there are: {'; '.join(paces)}."
            )
        again = [recipe for recipe in self.recipes if recipe.name in paces and recipe.name != name]
        twins = [replace(recipe, name=f"{recipe.name}, seconds of {name}", seconds_of=name) for recipe in again]
        return replace(self, recipes=(*self.recipes, *twins))

    def only(self, names: Sequence[str], seeds: Sequence[int]) -> Study:
        """The same study of some recipes and seeds, in the study's order; empty: of all.

        Raises:
            ConfigError: no recipe has that name.
        """
        known = [recipe.name for recipe in self.recipes]
        for name in names:
            if name not in known:
                raise ConfigError(f"--only: no recipe is called {name!r}; there are: {'; '.join(known)}.")
        recipes = tuple(recipe for recipe in self.recipes if not names or recipe.name in names)
        return replace(self, recipes=recipes, seeds=tuple(seeds) or self.seeds)

    def order(self) -> Iterator[tuple[Recipe, int]]:
        """Every run once, (recipe, seed): all recipes of the first seed, then the next; what is not trained has one."""
        for number, seed in enumerate(dict.fromkeys(self.seeds)):
            for recipe in self.recipes:
                if not recipe.untrained or number == 0:
                    yield recipe, seed


@dataclass(frozen=True)
class Places:
    """Where a study finds and puts things."""

    run: Path
    """YAML of a run, which the recipes change."""
    model: Path
    train: Path
    held_out: Path
    runs: Path
    """Checkpoints, and tokens made from raw text."""
    overrides: tuple[str, ...] = ()
    """`a.b=c` over everything, the recipes' own settings too: to shrink a study."""
    code: Path | None = None
    """Folder of program code to mix with the text; None: this Python's standard library."""

    def text_of(self, mixture: Mixture) -> Path:
        """Where training text mixed so lies, or is to be written."""
        if mixture == Mixture():
            return self.train
        return self.runs / "mixed" / f"code-{mixture.code:g}-notes-{mixture.notes}-seed-{mixture.seed}"


def configure(study: Study, recipe: Recipe, seed: int, places: Places, own_context: int) -> RunConfig:
    """The configuration of one run.

    Args:
        own_context: tokens the base was made for.

    Raises:
        ConfigError: the recipe's settings are no valid run.
    """
    context = round(own_context * (recipe.stretch or study.stretch))
    # Last what the study itself decides: a recipe may replace whole sections.
    settings: dict[str, Any] = {
        **dict(study.common),
        **dict(recipe.settings),
        "model.path": str(places.model),
        "model.context": context,
        "data.path": str(places.text_of(recipe.mix)),
        "data.cache": str(places.runs / "tokens"),
        "eval.path": str(places.held_out),
        "eval.lengths": [],
        "eval.stride": None,
        "train.seed": seed,
        "save.every": 0,
        "output": str(places.runs / "unnamed"),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        config = load_config(places.run, [*overrides, *places.overrides])
    except ConfigError as error:
        raise ConfigError(f"Recipe {recipe.name!r}: {error}") from None
    return config


_LATER = (
    ("data", "bos", "auto"),
    ("data", "eos", "auto"),
    ("attention", "dilation", 1),
    ("model", "family", "local"),
    ("model", "fp8_recipe", "none"),
)
"""Settings that came after studies had been run: section, name, and what is as it was."""


def train_key(recipe: Recipe, config: RunConfig, base_hash: str, data: str) -> str:
    """Hash of all that decides the weights of a run.

    Args:
        base_hash: of the base's weights.
        data: fingerprint of the training tokens.
    """
    decisive = {key: value for key, value in config_dict(config).items() if key not in _NOT_DECISIVE}
    decisive["model"] = {key: value for key, value in decisive["model"].items() if key != "path"}
    decisive["data"] = {key: value for key, value in decisive["data"].items() if key not in ("path", "cache")}
    decisive["train"] = {key: value for key, value in decisive["train"].items() if key != "rerun_spikes"}
    for section, name, usual in _LATER:
        if decisive[section][name] == usual:  # what was trained before it was a setting keeps its key
            del decisive[section][name]
    if recipe.strength != 1:
        decisive["strength"] = recipe.strength
    if recipe.untrained:
        decisive, data = {"model": decisive["model"]}, ""
    if recipe.whole:  # what only adapters look at decides nothing
        attention = {} if config.attention.kind == "full" else {"attention": decisive["attention"]}
        decisive = {key: decisive[key] for key in ("model", "data", "train")} | {"whole": "steps"}
        decisive |= attention
    text = json.dumps([VERSION, decisive, base_hash, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
