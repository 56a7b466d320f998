"""The one exception for mistakes a user can make and fix, and how a command line reports it."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
"""Exit code of every command for input the user can correct."""

EXIT_NON_FINITE = 3
"""Exit code of training after too many non-finite steps in a row."""

EXIT_PREEMPTED = 75
"""Exit code after SIGTERM: state is saved, run the same command again (sysexits.h EX_TEMPFAIL)."""


class UserError(Exception):
    """Bad input, told in one line: the thing, the value found and what was expected."""

    exit_code = EXIT_BAD_INPUT


class NonFiniteError(UserError):
    """Training met too many losses or gradients in a row that are not finite."""

    exit_code = EXIT_NON_FINITE


class Preempted(UserError):
    """SIGTERM was received and a checkpoint was written."""

    exit_code = EXIT_PREEMPTED


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; turn a ``UserError`` into one line on stderr and its exit code.

    So does what the file system refuses: a full disk, a read-only folder. Anything else is a defect of
    ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
