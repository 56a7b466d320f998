"""The exception for mistakes that a user can make and fix, checks that raise it, and exit codes."""

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
"""Exit code after SIGTERM, Ctrl-C, or a fault that may pass: state is saved, and the same command resumes
(sysexits.h EX_TEMPFAIL)."""


class UserError(Exception):
    """Bad input, reported in one line: the name, the value and what was expected."""

    exit_code = EXIT_BAD_INPUT


class NonFiniteError(UserError):
    """Too many losses or gradients in a row were not finite in training."""

    exit_code = EXIT_NON_FINITE


class NothingLearnedError(UserError):
    """Training ended with an adapter that is certainly no better than none."""

    exit_code = EXIT_NOTHING_LEARNED


class Preempted(UserError):
    """The command was asked to stop, and everything it had done is saved."""

    exit_code = EXIT_PREEMPTED


class TemporaryError(UserError):
    """Something is out of reach that the same command may find later; what was done is saved."""

    exit_code = EXIT_PREEMPTED


def short(error: BaseException) -> str:
    """The type and the first line of an error, in at most 300 characters."""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0]}"[:300]


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise a UserError of one line unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{name} is {value!r}: expected {expected}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a UserError of one line, with the nearest name, unless ``value`` is one of ``allowed``."""
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    require(value in allowed, name, value, f"one of {', '.join(allowed)}{hint}")


def named_directory(option: str, text: str) -> tuple[str, Path]:
    """Split ``NAME=DIR``.

    Args:
      option: the option that has the value, for the error.

    Raises:
      UserError: the value has another form.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(f"{option} {text!r}: expected NAME=DIR")
    return name, Path(path)


REPORTED_IN_ONE_LINE = (UserError, OSError, KeyboardInterrupt)
"""Exceptions that end a command with one line; any other is a defect and keeps its traceback."""


class ExitReport(NamedTuple):
    """The line on standard error and the exit code with which a command ends."""

    line: str
    code: int


_GIVEN: dict[str, str] = {}
"""What the user gave, by the folder that stands for it."""


def stand_for(folder: Path, given: str) -> None:
    """Let messages name what the user gave, where they would name a temporary folder in its place."""
    _GIVEN[str(folder)] = given


def as_given(text: object) -> str:
    """A text, or a path, with what the user gave in the place of temporary folders; see :func:`stand_for`."""
    shown = str(text)
    for folder, given in _GIVEN.items():
        shown = shown.replace(folder, given)
    return shown


def printable(text: str) -> str:
    r"""Escape foreign text into one line, so that it cannot move a terminal's cursor.

    >>> print(printable("a\nb\x1b[31m"))
    a\nb\x1b[31m
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def exit_report(error: UserError | OSError | KeyboardInterrupt) -> ExitReport:
    """The line and the exit code for a user's mistake, a refusal of the file system, or Ctrl-C."""
    if isinstance(error, UserError):
        return ExitReport(printable(" ".join(as_given(error).split())), error.exit_code)
    if isinstance(error, OSError):
        where = f"{as_given(error.filename)}: " if error.filename else ""
        return ExitReport(f"{where}{error.strerror or error}", EXIT_BAD_INPUT)
    return ExitReport("interrupted", 130)
