"""The options of every command: a help that fits a screen, and a mistake that is one line. No torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from pipeline.reporting.command import TOLD, program, say

_EXAMPLE = re.compile(r":? ?`[^`]*`\.?$")


class _Screen(argparse.HelpFormatter):
    """Short placeholders, and a usage line of what must be given, since every option is listed below it."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=22, **settings)

    def add_usage(
        self, usage: str | None, actions: Iterable[Any], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        """Name the command and what it needs."""
        either = [group for group in groups if group.required]
        named = {id(action) for group in either for action in group._group_actions}
        words = ["%(prog)s"]
        for action in actions:
            if action.required and id(action) not in named:
                words.append(self._needed(action))
        for group in either:
            words += ("(" + " | \n".join(map(self._needed, group._group_actions)) + ")").split("\n")
        lines, indent = [words.pop(0)], " " * (len("usage: ") + len(self._prog) + 1)
        width = self._width - len(indent)
        for word in [*words, "[options]"]:
            if len(lines) > 1 and len(lines[-1]) + 1 + len(word) <= width:
                lines[-1] = f"{lines[-1].rstrip()} {word}"
            else:
                lines.append(word)
        super().add_usage(f"{lines[0]} {f'\n{indent}'.join(line.rstrip() for line in lines[1:])}", [], [], prefix)

    def _needed(self, action: argparse.Action) -> str:
        placeholder = self._format_args(action, self._get_default_metavar_for_optional(action))
        if not action.option_strings:
            return self._format_args(action, self._get_default_metavar_for_positional(action))
        return f"{action.option_strings[0]} {placeholder}".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        if kind.endswith("_path"):
            return "PATH"
        return {"int": "N", "float": "X"}.get(kind, getattr(action.type, "metavar", action.dest.upper()))


class Parser(argparse.ArgumentParser):
    """argparse's, for a command of this project.

    Args:
        module: of the command, for its name.
        text: what it does: the first paragraph counts, without an example at its end.
        page: where in docs/ the rest is written.
    """

    def __init__(self, module: str, text: str | None, page: str = "") -> None:
        first = " ".join((text or "").partition("\n\n")[0].split())
        super().__init__(
            prog=program(module),
            description=_EXAMPLE.sub(".", first).replace("%", "%%"),
            epilog=f"More is in docs/{page}." if page else None,
            formatter_class=_Screen,
        )

    def error(self, message: str) -> NoReturn:
        """Leave with one line, as for everything that a user can mend."""
        message = message.removeprefix("argument ")
        for kind, noun in (("int", "a whole number"), ("float", "a number")):
            message = message.replace(f"invalid {kind} value: ", f"must be {noun}, got ")
        say(f"error: {message if message.endswith('.') else f'{message}; see {self.prog} --help.'}")
        raise SystemExit(TOLD)


def checked[T](kind: Callable[[str], T], holds: Callable[[T], bool], what: str, metavar: str) -> Callable[[str], T]:
    """An `argparse` type: a value of `kind` of which something holds.

    Args:
        what: what it must be, for the sentence.
        metavar: what stands for it in a help.
    """

    def read(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    read.metavar = metavar  # type: ignore[attr-defined]
    return read


def whole_number(least: int = 1) -> Callable[[str], int]:
    """An `argparse` type: a whole number of at least so much."""
    return checked(int, lambda value: value >= least, f"a whole number, {least} or more", "N")
