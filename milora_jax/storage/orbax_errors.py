"""The errors of a save by Orbax: which to report, and which not to print.

A save that fails, on a full disk for example, fails in several threads of Orbax. Each logs its exception with
a traceback and keeps it for ``result()``, which raises it. The other writes of TensorStore then report to an
event loop that is already closed, which prints one traceback each. The exception of ``result()`` is the only
one that matters.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import threading
from typing import Any

from milora_jax.storage.manifest import DamagedError

FAILURES = (OSError, ValueError, RuntimeError, DamagedError)
"""Exceptions of a failed save; TensorStore reports a full disk as a ``ValueError``."""

SOURCE = "orbax/checkpoint/_src/futures/future.py"
"""End of the path of the module whose threads keep their exception for ``result()``."""

CLOSED = "Event loop is closed"
"""The message of asyncio for a write that ends after its save has failed."""

_SYSTEM_CODE = re.compile(r"(?:\[Errno |os_error_code=')([0-9]+)")
"""The forms in which Python and TensorStore write a system error's number."""


def reason_of(error: Exception) -> str:
    """The system's message, such as "No space left on device", else the first line of the error."""
    code = _SYSTEM_CODE.search(str(error))
    if code:
        return os.strerror(int(code[1]))
    return (str(error).splitlines() or [type(error).__name__])[0]


@functools.cache
def keep_quiet() -> None:
    """Drop these messages, and no others, from now on; later calls do nothing.

    This holds until the process ends, because the threads of a failed save outlive it.
    """
    logging.getLogger("absl").addFilter(_is_news)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error, native = unraisable.exc_value, unraisable.object is None
        in_main = threading.current_thread() is threading.main_thread()
        if in_main or not native or not isinstance(error, RuntimeError) or str(error) != CLOSED:
            before(unraisable)

    sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record is not the exception of such a thread."""
    return record.exc_info is None or not record.pathname.endswith(SOURCE)
