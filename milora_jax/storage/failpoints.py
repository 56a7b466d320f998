"""Points at which a test can kill the process, as a power cut would."""

from __future__ import annotations

import os
import signal
from collections import Counter

from milora_jax.errors import UserError

VARIABLE = "MILORA_FAILPOINT"
"""Environment variable ``NAME:N``: die by SIGKILL when point NAME is reached for the N-th time."""

FAILPOINTS = (
    "before-save",
    "tree-written",
    "metadata-written",
    "before-manifest",
    "before-rename",
    "after-rename",
    "during-delete",
)
"""Points of a checkpoint save in the order they are reached; the last one only if an old step is deleted."""

_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Kill this process if the environment says so for this point; otherwise do nothing.

    Raises:
      UserError: the variable is set and is not ``NAME:N`` with a known name and N at least 1.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, _, count = wanted.rpartition(":")
    if point not in FAILPOINTS or not count.isdecimal() or int(count) < 1:
        raise UserError(f"{VARIABLE} is {wanted!r}: expected NAME:N, NAME one of {', '.join(FAILPOINTS)}")
    _reached[name] += 1
    if name == point and _reached[name] == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
