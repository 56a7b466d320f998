"""The lock of a workdir, which admits one run."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from milora_jax.addresses import require_local
from milora_jax.errors import UserError

LOCK = ".lock"


class WorkdirBusy(UserError):
    """Another run holds the workdir."""


class WorkdirLock:
    """Lock a workdir for the ``with`` block, or until the process dies.

    The lock is the kernel's (``flock`` on ``.lock``), so a killed run never leaves a stale one. The file
    stays, because deleting it would let two runs lock two different files. The lock works between processes
    of one host on any local file system. Over NFS, Linux makes it a lock of the server, so it works between
    hosts too, unless the share is mounted with ``nolock`` or ``local_lock``; Lustre needs the ``flock`` mount
    option. Buckets mounted as file systems do not lock between hosts, and some refuse, which is reported. A
    process forked inside the block shares the lock until it ends too.

    Raises (on entering):
      WorkdirBusy: another run holds the workdir; the error names its process and host.
      UserError: the workdir cannot be locked.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self._descriptor: int | None = None

    def __enter__(self) -> WorkdirLock:
        require_local(self.workdir, "a directory, only train.py writes to buckets")
        path = self.workdir / LOCK
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot use workdir {self.workdir}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "process unknown"
            os.close(descriptor)
            raise WorkdirBusy(f"workdir {self.workdir} is in use by another run ({holder})") from error
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"cannot lock {path}: {error.strerror}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
