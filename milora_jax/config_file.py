"""Files of settings are Python files with a function that returns the settings."""

from __future__ import annotations

import runpy
import traceback
from pathlib import Path
from typing import Any

from milora_jax.errors import UserError


def call_config_file(path: Path, function: str, *arguments: str, example: str) -> Any:
    """Call a function of a file of settings and return its result.

    Args:
      function: the function's name.
      example: a file that has such a function, for errors.

    Raises:
      UserError: there is no such file or function, or the file raises an error; the error names the line.
    """
    if not path.is_file():
        raise UserError(f"--config {str(path)!r}: no such file, expected for example {example}")
    try:
        found = runpy.run_path(str(path)).get(function)
        if callable(found):
            return found(*arguments)
    except UserError:
        raise
    except Exception as error:  # the file is the user's code, which may raise anything
        raise UserError(f"--config {place_in(path, error)}: {type(error).__name__}: {error}") from None
    raise UserError(f"--config {str(path)!r} has no {function}(), expected a file such as {example}")


def place_in(path: Path, error: Exception) -> str:
    """A file, and the line of it that an error passed last, where there is one."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
