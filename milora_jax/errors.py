"""The one exception for mistakes a user can make and fix, checks that raise it, and exit codes."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

EXIT_BAD_INPUT = 2
"""Exit code of every command for input the user can correct."""

EXIT_NON_FINITE = 3
"""Exit code of training after too many non-finite steps in a row."""

EXIT_NOTHING_LEARNED = 4
"""Exit code of training that ended at the uniform guess, or with gradients of exactly zero."""

EXIT_PREEMPTED = 75
"""Exit code after SIGTERM or Ctrl-C: state is saved, run the same command again (sysexits.h EX_TEMPFAIL)."""


class UserError(Exception):
    """Bad input, told in one line: the thing, the value found and what was expected."""

    exit_code = EXIT_BAD_INPUT


class NonFiniteError(UserError):
    """Training met too many losses or gradients in a row that are not finite."""

    exit_code = EXIT_NON_FINITE


class NothingLearnedError(UserError):
    """Training came to its end, and the adapter is certainly no better than none."""

    exit_code = EXIT_NOTHING_LEARNED


class Preempted(UserError):
    """The command was asked to stop, and all that it had done is saved."""

    exit_code = EXIT_PREEMPTED


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise one clear line unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{name} is {value!r}: expected {expected}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise one clear line, with the nearest name, unless ``value`` is one of ``allowed``."""
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    require(value in allowed, name, value, f"one of {', '.join(allowed)}{hint}")


def named_directory(option: str, text: str) -> tuple[str, Path]:
    """The parts of ``NAME=DIR``.

    Args:
      option: whose value it is, for the error.

    Raises:
      UserError: it is of another form.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(f"{option} {text!r}: expected NAME=DIR")
    return name, Path(path)


REPORTED_IN_ONE_LINE = (UserError, OSError, KeyboardInterrupt)
"""What ends a command with one line; anything else is a defect of ours and keeps its traceback."""


class ExitReport(NamedTuple):
    """The line on standard error and the exit code with which a command ends."""

    line: str
    code: int


def printable(text: str) -> str:
    r"""Text of somebody else as one line: whatever would move a terminal's cursor is written out.

    >>> print(printable("a\nb\x1b[31m"))
    a\nb\x1b[31m
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def exit_report(error: UserError | OSError | KeyboardInterrupt) -> ExitReport:
    """The line and the exit code of a mistake, of what the file system refuses, or of Ctrl-C."""
    if isinstance(error, UserError):
        return ExitReport(printable(" ".join(str(error).split())), error.exit_code)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return ExitReport(f"{where}{error.strerror or error}", EXIT_BAD_INPUT)
    return ExitReport("interrupted", 130)
