"""The long options of a command, read from where its source adds them to its parser.

A shell that completes a word need not wait for the command's imports. Texts that are other programs' options, which a
command hands on, are not among them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

_ADDS = "add_argument"
_ROWS = "add_integers"
"""Function of tools/support/command_line.py that is given (option, default, help)."""


def options_of(file: Path, home: Path) -> list[str]:
    """Options that the command in `file` takes.

    Args:
        home: folder of the packages, for functions of others that add options too.
    """
    return sorted({*_added(ast.parse(file.read_text(encoding="utf-8")), home), "--help"})


def _added(part: ast.AST, home: Path) -> Iterator[str]:
    """Options that are added within `part`, a module or a function, and within what it calls of tools/."""
    sources = {
        name.name: node.module
        for node in ast.walk(part)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tools.")
        for name in node.names
    }
    for call in _calls(part):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name == _ADDS:
            yield from _options(call, part)
        elif name == _ROWS:
            yield from (_text(row.elts[0]) for row in call.args[1:] if isinstance(row, ast.Tuple))
        elif name in sources and "_arguments" in name:
            yield from _function(home.joinpath(*str(sources[name]).split(".")).with_suffix(".py"), name, home)


def _function(file: Path, name: str, home: Path) -> Iterator[str]:
    """Options that a function adds, and the functions that it calls in its own module."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    yield from _added(functions[name], home)
    for call in _calls(functions[name]):
        called = getattr(call.func, "id", "")
        if called in functions and called != name:
            yield from _function(file, called, home)


def _calls(part: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(part) if isinstance(node, ast.Call)]


def _options(call: ast.Call, part: ast.AST) -> Iterator[str]:
    """The long options of one add_argument, but for hidden ones; `--no-x` too where argparse adds it."""
    more = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if more.get("help") == "argparse.SUPPRESS":
        return
    for argument in call.args:
        for text in [_text(argument)] if isinstance(argument, ast.Constant) else _spelled(argument, part):
            if text.startswith("--"):
                yield text
                if more.get("action") == "argparse.BooleanOptionalAction":
                    yield f"--no-{text[2:]}"


def _spelled(argument: ast.expr, part: ast.AST) -> list[str]:
    """What an f-string such as f"--{name}" is in a loop over written values."""
    if not isinstance(argument, ast.JoinedStr):
        return []
    for loop in (node for node in ast.walk(part) if isinstance(node, ast.For)):
        if any(node is argument for node in ast.walk(loop)) and isinstance(loop.iter, ast.Tuple | ast.List):
            targets = loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target]
            rows = [row.elts if isinstance(row, ast.Tuple) else [row] for row in loop.iter.elts]
            names = [ast.unparse(name) for name in targets]
            known = [dict(zip(names, map(_text, row), strict=True)) for row in rows]
            return ["".join(_filled(piece, values) for piece in argument.values) for values in known]
    return []


def _filled(piece: ast.expr, values: Mapping[str, str]) -> str:
    return values.get(ast.unparse(piece.value), "") if isinstance(piece, ast.FormattedValue) else _text(piece)


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
