"""The lock of a workdir in a bucket, which admits one run.

The lock is the object ``.lock``. It is created on the condition that there is none, and its holder rewrites
it every few seconds on the condition that it is still the holder's. Another run takes it over, on the
condition of the version that it saw, only after that version has not changed for :data:`LEASE_SECONDS` of its
own monotonic clock. So no clock is compared with another, and a wrong one cannot matter.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from milora_jax.errors import Preempted, UserError
from milora_jax.storage.bucket import Bucket
from milora_jax.storage.lock import LOCK, WorkdirBusy

LEASE_SECONDS = 60.0
"""Time without a heartbeat after which the holder is taken for dead; longer than tensorstore retries one."""

HEARTBEAT_SECONDS = 10.0
"""Time between two heartbeats."""

LOOK_SECONDS = 2.0
"""Time between two looks at a lock that another run holds."""

FRESH_SECONDS = 1.0
"""Age up to which a heartbeat is no reason for another: a bucket takes one write per object and second."""


class BucketLock:
    """Hold the lock of a bucket's workdir for the ``with`` block.

    Args:
      log: receives a line before the wait for a lock whose holder may be dead.
      stop: asked while waiting; returns whether to give up.

    Raises (on entering):
      WorkdirBusy: another run holds the workdir, and lives.
      Preempted: ``stop`` returned true.
      UserError: the bucket is missing, or gives no right to write.
    """

    def __init__(self, bucket: Bucket, log: Callable[[str], None], stop: Callable[[], bool]) -> None:
        self._bucket, self._log, self._stop = bucket, log, stop
        self._token, self._beats = secrets.token_hex(8), 0
        self._generation: bytes | None = None
        self._beaten = 0.0
        self._mutex, self._released = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="workdir lock", daemon=True)

    def __enter__(self) -> BucketLock:
        seen, looked, quiet = None, 0.0, 0.0
        while True:
            found, now = self._bucket.read(LOCK), time.monotonic()
            # A look that took long, because the network was out, is no evidence of a silent holder.
            quiet = quiet + min(now - looked, 2 * LOOK_SECONDS) if found.generation == seen else 0.0
            looked = now
            if (found.content is None or quiet >= LEASE_SECONDS) and self._write(found.generation):
                self._thread.start()
                return self
            if found.content is None:
                continue  # another run was faster, and the next look shows it
            if seen is None:
                seen = found.generation
                self._log(
                    f"workdir {self._bucket.url} is locked by {_holder(found.content)}: waiting up to "
                    f"{LEASE_SECONDS:.0f} s for a sign of life of that run"
                )
            elif found.generation != seen:
                raise WorkdirBusy(
                    f"workdir {self._bucket.url} is in use by another run ({_holder(found.content)})"
                )
            if self._stop():
                raise Preempted(f"stopped while waiting for the lock of {self._bucket.url}")
            time.sleep(LOOK_SECONDS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._released.set()
        self._thread.join()
        with self._mutex:
            if self._generation is not None:
                with suppress(UserError):  # it then ends with its lease
                    self._bucket.write(LOCK, None, self._generation)
            self._generation = None

    def confirm(self) -> None:
        """Make sure that this run holds the lock now, before something is written under it.

        Raises:
          WorkdirBusy: another run has taken it over.
          UserError: the bucket cannot be reached.
        """
        with self._mutex:
            if self._generation is not None and time.monotonic() - self._beaten < FRESH_SECONDS:
                return
            if self._generation is None or not self._write(self._generation):
                self._generation = None
                raise WorkdirBusy(
                    f"workdir {self._bucket.url} was taken over by another run, because this one had not "
                    "reached it for a while: nothing more is written"
                )

    def _keep(self) -> None:
        """Beat until the release; runs in a thread of its own."""
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(UserError):  # the next write under the lock reports it
                self.confirm()

    def _write(self, expected: bytes) -> bool:
        """Write the lock as this run's; False if the newest version is not the expected one."""
        began = time.monotonic()
        self._beats += 1
        held = {"run": _this_process(), "token": self._token, "beats": self._beats}
        generation = self._bucket.write(LOCK, json.dumps(held).encode(), expected)
        if generation is None:
            return False
        self._generation, self._beaten = generation, began
        return True


def _this_process() -> str:
    return f"pid {os.getpid()} on host {socket.gethostname()}"


def _holder(content: bytes | None) -> str:
    """The process that a lock names."""
    try:
        value: Any = json.loads(content or b"")
        return str(value["run"])[:200]
    except (ValueError, LookupError, TypeError, RecursionError):
        return "process unknown"
