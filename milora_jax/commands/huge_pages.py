"""One new start of a command line, so that glibc asks Linux for huge pages.

XLA allocates its temporaries on a CPU anew in every step, and the kernel then hands out and clears pages of
4 KiB. Where ``transparent_hugepage`` is ``madvise``, glibc (2.35 and later) asks for pages of 2 MiB if
``GLIBC_TUNABLES`` has ``glibc.malloc.hugetlb=1``, which it reads only when a process starts. With ``always``
the kernel needs no request, and with ``never`` it honours none. ``docs/performance.md`` has the figures.

The process replaces itself (``execve``): process id, open files, signal mask and parent stay what they were.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

SWITCH = "MILORA_HUGE_PAGES"
"""An environment variable; ``0`` leaves the process as it was started. The new start has it."""

TUNABLE = "glibc.malloc.hugetlb"

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Linux' modes of huge pages, the present one in brackets."""

OPTIONS_WITH_VALUE = "cmWX"
"""Python's single-letter options that take a value."""


def restart() -> None:
    """Start this command line anew with huge pages where that helps and changes nothing else.

    Does nothing where it does not apply, and where the new start is refused. Call it before any work.
    """
    if os.environ.get(SWITCH) == "0" or not (_helps() and _is_plain()):
        return
    tunables = with_huge_pages(os.environ.get("GLIBC_TUNABLES", ""))
    if tunables is None:
        return
    environment = {**os.environ, "GLIBC_TUNABLES": tunables, SWITCH: "0"}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # the process goes on as it was started


def with_huge_pages(tunables: str) -> str | None:
    """``GLIBC_TUNABLES`` with huge pages added; None where it says already whether they are used.

    >>> with_huge_pages("glibc.malloc.arena_max=1")
    'glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1'
    """
    given = [each for each in tunables.split(":") if each]
    if any(each.startswith(f"{TUNABLE}=") for each in given):
        return None
    return ":".join([*given, f"{TUNABLE}=1"])


def on_cpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX will compute on CPUs: ``JAX_PLATFORMS`` says so, or no plug-in of a device is installed."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _helps() -> bool:
    """Whether glibc would ask for huge pages, Linux would give them, and JAX computes on CPUs."""
    if sys.platform != "linux" or not on_cpu(os.environ):
        return False
    if "malloc" in os.environ.get("LD_PRELOAD", ""):  # jemalloc, tcmalloc, mimalloc
        return False
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        newer = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        return newer and "[madvise]" in MODES.read_text()
    except (OSError, ValueError):
        return False


def _is_plain() -> bool:
    """Whether nothing else looks at this process, and Python's own arguments would start the same again."""
    watched = sys.gettrace() is not None or sys.getprofile() is not None
    if sys.version_info >= (3, 12):
        watched = watched or any(sys.monitoring.get_tool(each) for each in range(6))
    alone = threading.active_count() == 1
    return (
        alone
        and not watched
        and bool(sys.executable)
        and starts_main(sys.orig_argv, sys.argv, _main_module())
    )


def _main_module() -> str:
    """The name after ``python -m``; empty for a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "" if spec is None else spec.name.removesuffix(".__main__")


def starts_main(original: Sequence[str], arguments: Sequence[str], module: str) -> bool:
    """Whether a Python command line starts a script or a module itself, and not through another program.

    Args:
      original: ``sys.orig_argv``.
      arguments: ``sys.argv``.
      module: the module that was started; empty for a script.

    >>> starts_main(["python", "-X", "dev", "-um", "a.b", "-x"], ["/a/b.py", "-x"], "a.b")
    True
    >>> starts_main(["python", "-m", "profiler", "a.py"], ["a.py"], "")
    False
    """
    rest = list(original[1:])
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            return not module and [word, *rest] == list(arguments)
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                rest.pop(0)
            continue
        at = next((i for i, letter in enumerate(word) if i and letter in OPTIONS_WITH_VALUE), None)
        if at is None:
            continue
        value = word[at + 1 :] or rest.pop(0)
        if word[at] in "cm":
            return word[at] == "m" and value == module and rest == list(arguments[1:])
    return False
