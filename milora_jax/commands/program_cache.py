"""The cache of compiled programs that command lines keep between runs, in the user's cache folder.

It is JAX's persistent compilation cache. A user's own ``JAX_COMPILATION_CACHE_DIR`` is left alone, and
``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. JAX's keys hold the program, jaxlib's version, the flags
and the devices; the folder's name adds what a CPU can compute, because home folders are shared by machines.

JAX can limit the size itself (``JAX_COMPILATION_CACHE_MAX_SIZE``, which is left alone as well), under a lock
that every reading and every writing takes. But once a process is killed between the two files of an entry,
no further program is kept, and each costs a warning. Here a command removes what was not used for the longest
time, when it begins, once an hour: no lock is needed, since JAX compiles anew what it does not find.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT = 4 * 2**30
"""Bytes of all programs, of every machine and version, after each look at them."""

LOOK_EVERY = 3600.0
"""Seconds between two looks: one takes some 36 microseconds for a file, of which there may be thousands."""

OWN_SETTINGS = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
)
"""A user who sets one of them decides about the cache."""

DEFAULTS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Small programs are kept as well: a start runs hundreds, and each takes tens of milliseconds to compile."""

FAILED = (
    "Error reading persistent compilation cache entry",
    "Error writing persistent compilation cache entry",
)


def keep_programs() -> None:
    """Let JAX, which is not imported yet, keep its programs; one line on standard error where it cannot."""
    if any(name in os.environ for name in OWN_SETTINGS):
        return
    try:
        root = cache_folder(os.environ)
        folder = root / machine_name()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        trim_now_and_then(root)
        reason = unsafe(folder)
    except (OSError, RuntimeError) as error:
        reason = str(error)
    if reason:
        print(f"warning: compiled programs are not kept: {reason}", file=sys.stderr, flush=True)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _report_once(folder)


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The folder of all programs: in ``XDG_CACHE_HOME``, which counts if it is absolute, or ``~/.cache``.

    Raises:
      RuntimeError: there is no home folder.
    """
    given = Path(environment.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "milora_jax" / "programs"


def machine_name(information: Path = Path("/proc/cpuinfo")) -> str:
    """A name for all machines with the same kind of CPU.

    XLA compiles for the instructions that it finds, and a program for others ends the process.
    """
    described = [platform.machine(), platform.processor()]
    try:
        with information.open() as file:  # it has a block for every core, and the first says it all
            lines = file.read(8192).split("\n\n")[0].splitlines()
        kinds = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        described += [line for line in lines if line.startswith(kinds)]
    except OSError:
        pass  # not Linux
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:12]}"


def unsafe(folder: Path) -> str:
    """Why programs in a folder are not run or cannot be kept; empty if there is no reason.

    A program from the cache is code: only the user themself may have written it.
    """
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        return f"{folder} is another user's, or others may write there"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def trim_now_and_then(root: Path) -> None:
    """:func:`trim` to :data:`LIMIT`, unless that was done in the last hour."""
    stamp = root / "looked-at"
    if stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < LOOK_EVERY:
        return
    stamp.touch()  # first, so that commands that begin together do not all look
    trim(root, LIMIT)


def trim(root: Path, limit: int) -> None:
    """Remove the files that were not read or written for the longest time, until ``limit`` bytes are left.

    Several processes may do so at once, and while others read and write.
    """
    used = []
    for path in root.rglob("*"):
        try:
            status = path.lstat()
        except OSError:
            continue  # another process has removed it
        if path.is_file():
            used.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(each[1] for each in used)
    for _, bytes_of_it, path in sorted(used):
        if size <= limit:
            return
        path.unlink(missing_ok=True)
        size -= bytes_of_it


def _report_once(folder: Path) -> None:
    """Make one line of JAX's warnings about its cache: on a full disk there is one for each program."""
    show, reported = warnings.showwarning, []

    def show_warning(message: Warning | str, *rest: Any, **more: Any) -> None:
        if not str(message).startswith(FAILED):
            show(message, *rest, **more)
        elif not reported:
            reported.append(message)
            line = f"warning: {message} (the run goes on; if this comes back, remove {folder})"
            print(line, file=sys.stderr, flush=True)

    warnings.showwarning = show_warning
