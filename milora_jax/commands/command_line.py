"""The common parts of the command lines: parser, choice of a subcommand, exit codes and signals."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from milora_jax.errors import REPORTED_IN_ONE_LINE, UserError, exit_report, one_of


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description as written, and adds defaults to the help of options."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        return with_default(text, action.default) if action.option_strings else text


def with_default(text: str, default: object) -> str:
    """The help of an option with its default, unless the text has the word or there is no default.

    >>> with_default("of the rows", 3)
    'of the rows (default: 3)'
    """
    none = default is None or default is False or default in ("", [], (), argparse.SUPPRESS)
    if none or "default" in text:
        return text
    shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return f"{text} (default: {shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line and a help that shows defaults."""

    def __init__(self, **settings: Any) -> None:
        """Make a parser; ``settings`` are arguments of ``argparse.ArgumentParser``."""
        super().__init__(**{"formatter_class": _HelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"command line: {message} (--help lists what there is)")


def print_commands(commands: Mapping[str, str]) -> None:
    """Print every command and its purpose."""
    width = max(map(len, commands))
    for name, what in commands.items():
        print(f"  {name:<{width}}  {what}")
    print("\neach has --help")


def choose_command(program: str, arguments: Sequence[str], commands: Mapping[str, str]) -> str:
    """Return the command in the first argument; print all commands for ``--help`` and for no argument.

    argparse's subparsers would build the parsers of all commands, whose modules take seconds to import.

    Args:
      program: the text before the command on a command line.
      commands: purpose of each command by name.

    Raises:
      UserError: the command does not exist.
      SystemExit: the commands were printed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND ...\n")
        print_commands(commands)
        raise SystemExit(0)
    one_of("the command", arguments[0], tuple(commands))
    return arguments[0]


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that half-written files are removed."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    caught = (signal.SIGTERM, signal.SIGHUP)
    old = [signal.signal(each, interrupt) for each in caught]
    try:
        yield
    finally:
        for each, handler in zip(caught, old, strict=True):
            signal.signal(each, handler)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; :data:`REPORTED_IN_ONE_LINE` becomes one line and an exit code."""
    try:
        main()
    except REPORTED_IN_ONE_LINE as error:
        line, code = exit_report(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
