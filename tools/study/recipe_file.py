"""Reads the list of recipes, a YAML file. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from tools.study.pace import check_budget, is_positive
from tools.study.plan import Asked, Recipe, Study, with_own_steps
from tools.support.mixture import Mixture

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
    recipes: list[Recipe] = []
    for number, entry in enumerate(_listed(top["recipes"], path, "recipes")):
        recipes.append(_recipe(entry, path, f"recipes[{number}]", recipes))
    if top.get("variants"):
        recipes = list(_varied(recipes, _listed(top["variants"], path, "variants"), path))
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two recipes are called {twice[0]!r}; give each its own name.")
    paces = with_own_steps(recipes)
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
            _stretch(top.get("stretch", 4.0), f"{path}: "),
            tuple(int(seed) for seed in _listed(top.get("seeds", [1234]), path, "seeds")),
            tuple(_keys(top.get("common") or {}, path, "common").items()),
            tuple(recipes),
            judge,
            tuple(recipes),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: seeds are integers ({error}).") from None


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


def _recipe(entry: Any, path: Path, where: str, before: Sequence[Recipe]) -> Recipe:
    """Args: before: recipes that stand above it, of which it may be `of` one."""
    if isinstance(entry, dict) and "of" in entry:
        return _weaker(_keys(entry, path, where, ("name", "of", "strength"), ("name", "strength")), path, where, before)
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
    stretch = _stretch(given["stretch"], f"{path}: {where}.") if given.get("stretch") is not None else None
    return Recipe(str(given["name"]), settings, untrained, stretch, mixture, whole, *budget)


def _stretch(value: Any, where: str) -> float:
    if not is_positive(value):
        raise ConfigError(
            f"{where}stretch: {value!r} is no number above 0; give the context over the base's own, e.g. 4."
        )
    return float(value)


def _weaker(given: Mapping[str, Any], path: Path, where: str, before: Sequence[Recipe]) -> Recipe:
    """Another recipe with less of its training left."""
    known = {recipe.name: recipe for recipe in before if not (recipe.untrained or recipe.whole or recipe.of)}
    if given["of"] not in known:
        raise ConfigError(f"{path}: {where}.of: {given['of']!r} is no recipe above that trains adapters.")
    strength = given["strength"]
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ConfigError(f"{path}: {where}.strength: {strength!r} is not from 0 (the base) to 1 (all of training).")
    return replace(known[given["of"]], name=str(given["name"]), of=given["of"], strength=float(strength))


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
                yield replace(
                    recipe, name=name, settings=own, seconds_of=called(recipe.seconds_of), of=called(recipe.of)
                )


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
        if value.get(key) in (None, "", [], {}):
            raise ConfigError(f"{path}: {where + '.' if where else ''}{key}: is missing.")
    return value


def _listed(value: Any, path: Path, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path}: {where} must be a list such as [a, b].")
    return value
