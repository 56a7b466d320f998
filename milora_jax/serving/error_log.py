"""Internal errors in the log: where one was raised and of what type, never its message.

The message of an exception may quote a prompt, a path or a key.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

log = logging.getLogger("milora_jax.serving")


def log_error(what: str, error: BaseException) -> None:
    """Log that something failed."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    log.error("%s: %s at %s", what, type(error).__name__, places)
