"""What a save by Orbax may fail with, what of it to tell, and what not to print.

A save that fails, on a full disk for example, fails in several threads of Orbax. Each logs its exception
with a traceback and keeps it for ``result()``, which raises it. The other writes of TensorStore then report
to an event loop that is closed already, which prints one traceback each. The exception that ``result()``
raises says all there is to know.
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
"""What a save may fail with; TensorStore reports a full disk as a ``ValueError``."""

SOURCE = "orbax/checkpoint/_src/futures/future.py"
"""End of the path of the module whose threads keep their exception for ``result()``."""

CLOSED = "Event loop is closed"
"""What asyncio says to a write that ends after its save has failed."""

_SYSTEM_CODE = re.compile(r"(?:\[Errno |os_error_code=')([0-9]+)")
"""How Python and TensorStore write the number of a system's error."""


def reason_of(error: Exception) -> str:
    """What the system said, "No space left on device" for example, else the first line of the error."""
    code = _SYSTEM_CODE.search(str(error))
    if code:
        return os.strerror(int(code[1]))
    return (str(error).splitlines() or [type(error).__name__])[0]


@functools.cache
def keep_quiet() -> None:
    """Begin to drop these messages, and no others; every later call does nothing.

    It holds until the process ends, because the threads of a failed save outlive the save.
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
    """Whether a log record is anything but the exception of such a thread."""
    return record.exc_info is None or not record.pathname.endswith(SOURCE)
