"""`longspan COMMAND ...`: the list of commands, shell completion, and the start of the program that was asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import CompletionItem, TyperCommand

from .home import enter
from .table import BENCHES, Program, there

EPILOG = (
    "Every command has --help. Exit codes: 0 done, 1 what was checked is wrong or no memory is left, "
    "2 a sentence you can mend, 130 Ctrl-C."
)


class _Handed(TyperCommand):
    """A command whose arguments, `--help` too, are the program's."""

    program: Program

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep every word, in its order."""
        ctx.args = list(args)
        return []

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The program's options; where there is none, the shell completes file names."""
        options = self.program.options if incomplete.startswith("-") else []
        return [CompletionItem(option) for option in options if option.startswith(incomplete)]


def start(program: Program, arguments: Sequence[str], called: str) -> int:
    """Run a program in this process; returns its exit code.

    Args:
        called: the words that stand for it in its own usage line.
    """
    enter()
    # argparse names a program by the last part of this.
    sys.argv[0] = called
    from pipeline.reporting.command import begin

    begin()
    package = program.file.name == "__main__.py"
    module = importlib.import_module(f"{program.module}.__main__" if package else program.module)
    code: int = module.main(list(arguments))
    return code


def _add(app: typer.Typer, program: Program, prefix: str) -> None:
    handed = type("Handed", (_Handed,), {"program": program})

    def run(context: typer.Context) -> None:
        raise typer.Exit(start(program, context.args, f"{prefix} {program.name}"))

    app.command(program.name, cls=handed, help=program.line, add_help_option=False)(run)


def application() -> typer.Typer:
    """Every command of this version."""
    app = typer.Typer(
        name="longspan",
        help="Long-context fine-tuning of Llama-class models: LongLoRA at scale.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # its frames would take a second screen
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_whole)
    for program in there():
        _add(app, program, "longspan")
    bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Benchmarks, each of one part.")
    for program in there(BENCHES):
        _add(bench, program, "longspan bench")
    app.add_typer(bench, name="bench")
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"longspan {version('longspan')}")
        raise typer.Exit


def _whole(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Say it and leave."),
) -> None:
    pass


def main() -> None:
    """The console script; a word that is no command is one line, as a mistake is everywhere."""
    try:
        code = application()(standalone_mode=False)
    except Exception as error:
        # Every mistake of a command line has it; the classes' names are typer's own affair.
        text = getattr(error, "format_message", str)()
        if not text:
            raise
        if not text.startswith("Usage: "):  # the help, where no command was given
            text = f"error: {' '.join(text.split())}"
        print(text, file=sys.stderr)
        code = 2
    sys.exit(code)
