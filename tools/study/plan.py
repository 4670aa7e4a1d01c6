"""The list of recipes, a YAML file, and what each makes of a run's configuration. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import config_dict, load_config
from tools.study.pace import check_budget
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
        paces = [recipe.name for recipe in self.every if not recipe.untrained and not recipe.budgeted]
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
        """Every run, (recipe, seed): all recipes of the first seed, then the next; what is not trained has one."""
        for number, seed in enumerate(self.seeds):
            for recipe in self.recipes:
                if not recipe.untrained or number == 0:
                    yield recipe, seed


PLANS = Path(__file__).parent
"""Where the shipped studies lie."""


def plan_file(name: str) -> Path:
    """A shipped study by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    known = sorted(path.stem for path in PLANS.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"--plan: {name!r} is not one of {', '.join(known)}; your own list of recipes is --study.")
    return PLANS / f"{name}.yaml"


def read_study(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        ConfigError: one sentence naming the file and the key.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); give the path of a study's YAML file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML, {' '.join(str(error).split())}.") from None
    top = _keys(tree, path, "", ("stretch", "seeds", "common", "variants", "recipes", "judge"), ("recipes",))
    recipes = []
    for number, entry in enumerate(_listed(top["recipes"], path, "recipes")):
        recipes.append(_recipe(entry, path, f"recipes[{number}]"))
    if top.get("variants"):
        recipes = list(_varied(recipes, _listed(top["variants"], path, "variants"), path))
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two recipes are called {twice[0]!r}; give each its own name.")
    paces = [recipe.name for recipe in recipes if not recipe.untrained and not recipe.budgeted]
    for number, recipe in enumerate(recipes):
        if recipe.seconds_of is not None and recipe.seconds_of not in paces:
            raise ConfigError(
                f"{path}: recipes[{number}].seconds_of: {recipe.seconds_of!r} is no recipe with steps of its own here."
            )
    given = _keys(top.get("judge") or {}, path, "judge", tuple(Asked.__dataclass_fields__))
    questions: dict[str, Any] = {name: tuple(part) if isinstance(part, list) else part for name, part in given.items()}
    try:
        judge = Asked(**questions)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        return Study(
            float(top.get("stretch", 4.0)),
            tuple(int(seed) for seed in _listed(top.get("seeds", [1234]), path, "seeds")),
            tuple(_keys(top.get("common") or {}, path, "common").items()),
            tuple(recipes),
            judge,
            tuple(recipes),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: stretch is a number and seeds are integers ({error}).") from None


def asked(study: Study, judge: Sequence[str], ruler: Sequence[str]) -> Study:
    """The study with other questions.

    Args:
        judge: `key=value`, of the section judge.
        ruler: see `Asked.ruler`; empty: the study's.

    Raises:
        ConfigError: no such key, or no such value.
    """
    changes: dict[str, Any] = {"ruler": tuple(ruler)} if ruler else {}
    for text in judge:
        key, sign, value = text.partition("=")
        if not sign or key not in Asked.__dataclass_fields__:
            raise ConfigError(
                f"--judge: {text!r} sets nothing; give key=value of {', '.join(Asked.__dataclass_fields__)}."
            )
        try:
            found = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--judge: {text!r}: the value is not valid YAML.") from None
        changes[key] = tuple(found) if isinstance(found, list) else found
    return replace(study, judge=replace(study.judge, **changes))


def _recipe(entry: Any, path: Path, where: str) -> Recipe:
    given = _keys(entry, path, where, _RECIPE_KEYS, ("name",))
    settings = tuple(_keys(given.get("set") or {}, path, f"{where}.set").items())
    mix = _keys(given.get("mix") or {}, path, f"{where}.mix", tuple(Mixture.__dataclass_fields__))
    untrained, whole = bool(given.get("untrained", False)), bool(given.get("whole", False))
    if untrained and (whole or mix):
        raise ConfigError(f"{path}: {where}: is untrained, so whole and mix mean nothing; remove them.")
    budget = given.get("seconds"), given.get("seconds_of")
    check_budget(f"{path}: {where}", *budget, untrained)
    try:
        mixture = Mixture(**mix)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: {where}.mix: {error}") from None
    return Recipe(str(given["name"]), settings, untrained, given.get("stretch"), mixture, whole, *budget)


def _varied(recipes: Sequence[Recipe], variants: Sequence[Any], path: Path) -> Iterator[Recipe]:
    """What is not trained as it is, then every trained recipe under the first variant's settings, then the next's."""
    trained = {recipe.name for recipe in recipes if not recipe.untrained}
    yield from (recipe for recipe in recipes if recipe.untrained)
    for number, entry in enumerate(variants):
        where = f"variants[{number}]"
        given = _keys(entry, path, where, ("name", "set"), ("name", "set"))
        settings = tuple(_keys(given["set"], path, f"{where}.set").items())

        def called(name: str | None, variant: str = str(given["name"])) -> str | None:
            return f"{name}, {variant}" if name in trained else name

        for recipe in recipes:
            if not recipe.untrained:
                name = str(called(recipe.name))
                own = (*settings, *recipe.settings)
                yield replace(recipe, name=name, settings=own, seconds_of=called(recipe.seconds_of))


_RECIPE_KEYS = ("name", "set", "untrained", "stretch", "mix", "whole", "seconds", "seconds_of")


def _keys(
    value: Any, path: Path, where: str, known: Sequence[str] | None = None, needed: Sequence[str] = ()
) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {where or 'the file'} must be a section of keys.")
    for key in value:
        if known is not None and key not in known:
            raise ConfigError(
                f"{path}: {where + '.' if where else ''}{key}: unknown key; known here: {', '.join(known)}."
            )
    for key in needed:
        if not value.get(key):
            raise ConfigError(f"{path}: {where + '.' if where else ''}{key}: is missing.")
    return value


def _listed(value: Any, path: Path, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path}: {where} must be a list such as [a, b].")
    return value


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
    if recipe.untrained:
        decisive, data = {"model": decisive["model"]}, ""
    if recipe.whole:  # what only adapters look at decides nothing
        attention = {} if config.attention.kind == "full" else {"attention": decisive["attention"]}
        decisive = {key: decisive[key] for key in ("model", "data", "train")} | {"whole": "steps"}
        decisive |= attention
    text = json.dumps([VERSION, decisive, base_hash, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
