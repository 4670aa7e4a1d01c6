"""docs/SETTINGS.md: every setting with its type, its default and the docstring it has where it is declared."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pipeline.config.paths import EXPANDED
from pipeline.config.resume import MAY_CHANGE
from pipeline.config.run import RunConfig

HEADER = f"""# Settings

Every setting that a run's YAML may have, written by `python -m tools.pages` from the docstrings in `pipeline/config/`.
Change them there. A name that is not here is refused, with the nearest name that is. On the command line
`--set train.lr=1e-5` overrides one setting. `~`, `$NAME` and `${{NAME}}` are expanded in every path. The default `null`
(None in the descriptions) means that nothing is set.

Settings that may differ from the checkpoint's when a run resumes, if `resume.allow` names them:
{", ".join(f"`{name}`" for name in MAY_CHANGE)}.
"""


def settings_page() -> str:
    """The whole page, as Markdown."""
    plain = [item for item in fields(RunConfig) if not is_dataclass(_hints(RunConfig)[item.name])]
    parts = [HEADER, "## The run\n\n" + _table(RunConfig, "", plain)]
    parts += [text for item in fields(RunConfig) for text in _section(_hints(RunConfig)[item.name], item.name)]
    return "\n".join(parts)


def field_docs(section: type) -> dict[str, str]:
    """The docstring of every field of a dataclass: the string that follows it, on one line.

    Raises:
        ValueError: a field that is not itself a section has none.
    """
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            found[statement.target.id] = " ".join(after.value.value.split())
    for item in fields(section):
        if item.name not in found and not is_dataclass(_hints(section)[item.name]):
            raise ValueError(f"{section.__name__}.{item.name}: has no docstring; say what it is, and its unit.")
    return found


def _hints(section: type) -> dict[str, Any]:
    return get_type_hints(section, vars(sys.modules[section.__module__]), include_extras=True)


def _section(kind: Any, key: str) -> list[str]:
    """The heading and table of a section and of the sections in it; nothing of a plain setting."""
    if not is_dataclass(kind) or not isinstance(kind, type):
        return []
    plain = [item for item in fields(kind) if not is_dataclass(_hints(kind)[item.name])]
    first = _escaped((inspect.getdoc(kind) or "").splitlines()[0])
    found = [f"## `{key}`\n\n{first}\n\n" + _table(kind, f"{key}.", plain)]
    return found + [text for item in fields(kind) for text in _section(_hints(kind)[item.name], f"{key}.{item.name}")]


def _table(section: type, prefix: str, chosen: list[Field[Any]]) -> str:
    docs, hints = field_docs(section), _hints(section)
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for item in chosen:
        cells = (f"`{prefix}{item.name}`", _type(hints[item.name]), _default(item), _escaped(docs[item.name]))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _escaped(text: str) -> str:
    """Docstrings as Markdown that shows them as they are, in a table's cell."""
    parts = text.split("`")  # every other one is code
    parts[::2] = [re.sub(r"[*<\[\]]", r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts).replace("|", r"\|")


def _type(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type(kind) for kind in get_args(hint) if kind is not NoneType)
    if EXPANDED in getattr(hint, "__metadata__", ()):
        return "path"
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return f"list of {_type(kinds[0])}" if kinds[-1] is Ellipsis else f"{len(kinds)} of {_type(kinds[0])}"
    if is_dataclass(hint):
        return "sections"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[hint]


def _default(item: Field[Any]) -> str:
    if item.default is MISSING:
        return "required"
    if item.default is None:
        return "`null`"
    if isinstance(item.default, bool):
        return f"`{str(item.default).lower()}`"
    if isinstance(item.default, tuple):
        return f"`[{', '.join(map(str, item.default))}]`"
    return f"`{item.default}`"
