"""Strict YAML to `RunConfig` and back. No torch: a wrong configuration is told before anything slow is imported.

The dataclasses of `run` are the only list of keys: this file walks their type hints. In paths `~` and `$NAME` are
expanded (see `paths`); relative ones stay relative to the directory a command is run from, not to the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from pipeline.config.hub import local_folder
from pipeline.config.paths import EXPANDED, expand
from pipeline.config.run import RunConfig

_NOUNS = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
}
AUTO = "auto"
"""In place of a section that has a switch of this name: that switch."""
# YAML 1.1 wants a point and a signed exponent: it reads 2e-5 and 1e5 as texts. A float field takes them.
_FLOAT_TEXT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


class _StrictLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raises yaml.constructor.ConstructorError on a repeated key."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or mapping as a key: the base class refuses it
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document; ConfigError with the line of what is wrong."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        if "alias" in f"{error.context} {error.problem}":
            raise ConfigError(f"{where}{line}: not valid YAML; put what begins with * into quotes.") from None
        raise ConfigError(f"{where}{line}: not valid YAML, {error.problem or error.context}; mend that line.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: e.g. a date such as 2024-13-45
        raise ConfigError(f"{where}: not valid YAML, {str(error).splitlines()[0]}.") from None


def _described(value: Any) -> str:
    """How an error shows a value."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a section of keys"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def _wrong(path: str, expected: str, value: Any, where: str) -> ConfigError:
    return ConfigError(f"{path}: expected {expected}, got {_described(value)} (in {where}).")


def _scalar(kind: type, value: Any, path: str, where: str) -> Any:
    """Check a bool, int, float or str; an integer or a text such as 2e-5 will do for a float."""
    if kind is float and (type(value) is int or (isinstance(value, str) and _FLOAT_TEXT.fullmatch(value))):
        try:
            value = float(value)
        except (ValueError, OverflowError):  # 1__0, or an integer of hundreds of digits
            raise _wrong(path, _NOUNS[kind], value, where) from None
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(path, _NOUNS[kind], value, where)
    return value


def _sequence(hint: Any, value: Any, path: str, where: str) -> tuple[Any, ...]:
    """Check a tuple field, written as a YAML list."""
    item_types = typing.get_args(hint)
    open_ended = item_types[-1] is Ellipsis
    if not isinstance(value, list):
        expected = "a list such as [a, b]" if open_ended else f"a list of {len(item_types)} values"
        raise _wrong(path, expected, value, where)
    if open_ended:
        item_types = (item_types[0],) * len(value)
    elif len(value) != len(item_types):
        raise _wrong(path, f"a list of {len(item_types)} values", value, where)
    return tuple(
        _value(kind, item, f"{path}[{i}]", where) for i, (kind, item) in enumerate(zip(item_types, value, strict=True))
    )


def _value(hint: Any, value: Any, path: str, where: str) -> Any:
    """Convert one YAML value to what a field's type hint asks for."""
    if dataclasses.is_dataclass(hint):
        # `eval:` with every key under it commented out is an empty section.
        return _section(typing.cast(type, hint), {} if value is None else value, path, where)
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        inner, *marks = typing.get_args(hint)
        text = _value(inner, value, path, where)
        return _path(text, path, where, marks[1:]) if EXPANDED in marks else text
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        # Of several kinds the value's own, or else the last one's sentence of what is wrong.
        fitting = [
            kind
            for kind in inner
            if kind is type(value) or (typing.get_origin(kind) is tuple and isinstance(value, list))
        ]
        return _value((fitting or inner)[-1 if not fitting else 0], value, path, where)
    if origin is tuple:
        return _sequence(hint, value, path, where)
    return _scalar(hint, value, path, where)


def _path(text: str, path: str, where: str, kinds: Iterable[str]) -> str:
    """A path of this machine, where `kinds` names one, of what the Hub's name of it stands for."""
    try:
        text = expand(text)
        for kind in kinds:
            text = local_folder(text, kind)
        return text
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).rstrip('.')} (in {where}).") from None


def _suggestion(name: str, prefix: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the same name where another section has it, or the nearest name of this one."""
    known = list(known)
    elsewhere = [path for path in _all_paths(RunConfig) if path.rsplit(".", 1)[-1] == name]
    near = [prefix + match for match in difflib.get_close_matches(name, known, n=1, cutoff=0.6)]
    if elsewhere or near:
        return f"did you mean {(elsewhere + near)[0]}?"
    return f"known here: {', '.join(known)}."


def _all_paths(kind: type, prefix: str = "") -> list[str]:
    """Every dotted key below a config dataclass."""
    paths = []
    for name, hint in typing.get_type_hints(kind).items():
        paths.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            paths += _all_paths(typing.cast(type, hint), f"{prefix}{name}.")
    return paths


def defaults(kind: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default of every setting that has one, tuples as lists."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(typing.cast(Any, kind)):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            found |= defaults(typing.cast(type, hint), f"{prefix}{item.name}.")
        elif item.default is not dataclasses.MISSING:
            found[prefix + item.name] = list(item.default) if isinstance(item.default, tuple) else item.default
    return found


def _section[T](kind: type[T], value: Any, path: str, where: str) -> T:
    """Build one config dataclass from a mapping; refuse unknown keys, name missing ones."""
    if value == AUTO and AUTO in typing.get_type_hints(kind):
        value = {AUTO: True}
    if not isinstance(value, dict):
        raise _wrong(path, "a section of keys", value, where)
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in value:
        if name not in hints:
            raise ConfigError(f"{prefix}{name}: unknown key in {where}; {_suggestion(str(name), prefix, hints)}")
    for item in dataclasses.fields(typing.cast(Any, kind)):
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if item.name not in value and not optional:
            raise ConfigError(
                f"{prefix}{item.name}: missing in {where}; {_example(hints[item.name], prefix + item.name)}"
            )
    return kind(**{name: _value(hints[name], item, f"{prefix}{name}", where) for name, item in value.items()})


def _example(hint: Any, path: str) -> str:
    """How to mend a missing key."""
    if dataclasses.is_dataclass(hint):
        needed = [
            item.name
            for item in dataclasses.fields(hint)
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        ]
        return f"add the section {path} with {' and '.join(needed)}."
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = typing.get_args(hint)[-1]  # the plainest
    noun = "a path" if typing.get_origin(hint) is typing.Annotated else _NOUNS[hint]
    return f"add {path} ({noun})."


def _override(tree: dict[Any, Any], text: str) -> None:
    """Apply one `a.b=c` to the parsed YAML, creating missing sections."""
    dotted, equals, raw = text.partition("=")
    names = [name.strip() for name in dotted.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"--set {text}: expected section.key=value, such as --set train.steps=100.")
    # Nothing on a command line has an alias of YAML.
    value = raw.strip() if raw.lstrip().startswith("*") else _parse_yaml(raw, f"--set {text}")
    *sections, last = names
    for depth, name in enumerate(sections):
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {text}: {'.'.join(sections[: depth + 1])} is a value, not a section of keys.")
    tree[last] = value


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read, override and validate one run's configuration.

    Args:
        path: YAML file, see `run.RunConfig` for the keys.
        overrides: `section.key=value` texts (`--set`), the value as YAML; applied before validation, later ones win.

    Raises:
        ConfigError: one sentence naming the file and the dotted key.
    """
    path = Path(path)
    overrides = list(overrides)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); give the path of a YAML configuration.") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {_described(tree)}"
        raise ConfigError(f"{path}: {found} where sections of keys (model, data, train, output) are expected.")
    for override in overrides:
        _override(tree, override)
    where = f"{path} with --set {' '.join(overrides)}" if overrides else str(path)
    return _section(RunConfig, tree, "", where)


def overridden(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The same run with some settings changed, as `load_config` changes those of a file.

    Raises:
        ConfigError: one sentence naming the dotted key.
    """
    tree, overrides = config_dict(config), list(overrides)
    for override in overrides:
        _override(tree, override)
    return _section(RunConfig, tree, "", f"--set {' '.join(overrides)}")


def config_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and scalars: every key, in `RunConfig`'s order."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal `RunConfig`."""
    return yaml.safe_dump(config_dict(config), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
