"""SIGTERM and Ctrl-C stop a job at a place where nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from milora_jax.errors import Preempted

NOTICES = {
    signal.SIGTERM: b"\nstopping as soon as nothing is lost\n",
    signal.SIGINT: b"\nstopping as soon as nothing is lost; Ctrl-C again stops at once\n",
}


@contextmanager
def watch_for_preemption() -> Iterator[Callable[[], bool]]:
    """Record SIGTERM and a first Ctrl-C instead of ending; a second Ctrl-C interrupts.

    Yields:
      A function that returns whether one of them was received.
    """
    received = False

    def note(signum: int, frame: object) -> None:
        nonlocal received
        received = True
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, old[signal.SIGINT])
        with suppress(OSError, ValueError):  # standard error need not be a file
            os.write(sys.stderr.fileno(), NOTICES[signal.Signals(signum)])  # print is not reentrant

    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if old[signal.SIGINT] is not signal.default_int_handler:  # a job in the background ignores it
        del old[signal.SIGINT]
    for number in old:
        signal.signal(number, note)
    try:
        yield lambda: received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_if_preempted(preempted: Callable[[], bool], doing: str) -> None:
    """End a job at a place where nothing is lost, if it was asked to stop.

    Raises:
      Preempted: it names what was being done.
    """
    if preempted():
        raise Preempted(f"stopped while {doing}: nothing is lost, run the same command again to continue")
