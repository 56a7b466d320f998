"""The one exception for mistakes a user can make and fix, and how a command line reports it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
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


TOLD = (UserError, OSError, KeyboardInterrupt)
"""What ends a command with one line; anything else is a defect of ours and keeps its traceback."""


class Ending(NamedTuple):
    """How a command ends: its line on standard error, and its exit code."""

    line: str
    code: int


def printable(text: str) -> str:
    r"""Text of somebody else as one line: whatever would move a terminal's cursor is written out.

    >>> print(printable("a\nb\x1b[31m"))
    a\nb\x1b[31m
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def ending(error: UserError | OSError | KeyboardInterrupt) -> Ending:
    """The line and the exit code of a mistake, of what the file system refuses, or of Ctrl-C."""
    if isinstance(error, UserError):
        return Ending(printable(" ".join(str(error).split())), error.exit_code)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Ending(f"{where}{error.strerror or error}", EXIT_BAD_INPUT)
    return Ending("interrupted", 130)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; what is in :data:`TOLD` becomes one line and an exit code."""
    try:
        main()
    except TOLD as error:
        line, code = ending(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
