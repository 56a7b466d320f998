"""``python -m milora_jax.evaluation lm-eval ...``: lm-evaluation-harness's own command with our model.

The arguments are those of ``lm_eval``; ``--model milora_jax`` is the default.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from milora_jax.errors import UserError
from milora_jax.evaluation.harness import NAME, harness_class


def main(arguments: Sequence[str]) -> None:
    """Register the model and run lm_eval.

    Raises:
      UserError: lm_eval is missing, or refuses the arguments, the tasks or their data.
    """
    harness_class()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *with_model(arguments)]  # its parser reads sys.argv only
    try:
        cli_evaluate()
    except UserError:
        raise
    except Exception as error:  # lm_eval, a foreign task or a data set may raise anything
        if _raised_in_this_package(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"lm_eval ended: {type(error).__name__}: {reason}{_advice(error)}") from None


def with_model(given: Sequence[str]) -> list[str]:
    """Add our model to the arguments of an evaluation that names none.

    >>> with_model(["--tasks", "mine"])
    ['run', '--model', 'milora_jax', '--tasks', 'mine']
    >>> with_model(["ls", "tasks"])
    ['ls', 'tasks']
    """
    arguments = list(given)
    if arguments and not arguments[0].startswith("-") and arguments[0] != "run":
        return arguments
    rest = arguments[1:] if arguments[:1] == ["run"] else arguments
    named = any(each.split("=")[0] in ("--model", "-M", "--config", "-C", "--help", "-h") for each in rest)
    return ["run", *([] if named else ["--model", NAME]), *rest]


def _raised_in_this_package(error: BaseException) -> bool:
    """Whether it is a defect of this package, which keeps its traceback."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("milora_jax.") and name != __name__ for name in frames)


def _advice(error: BaseException) -> str:
    """Advice about data that cannot be loaded."""
    if isinstance(error, (ConnectionError, FileNotFoundError)) or "Offline" in type(error).__name__:
        return ": a task's data comes from the Hub, run where it can be reached or give a task on local files"
    return ""
