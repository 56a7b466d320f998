"""Several processes, one per host of a cluster, that run the same program on all devices together.

Every process reads the same files and takes the same steps; only the first one writes.
All must see the same file system.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from milora_jax.cluster import Cluster
from milora_jax.errors import REPORTED_IN_ONE_LINE, Preempted, UserError, exit_report
from milora_jax.types import PyTree

HEARTBEAT_SECONDS = 30
"""Seconds without a heartbeat after which a process is taken for dead and all others end."""

SHUTDOWN_SECONDS = 60
"""Seconds that a finished process waits for the others."""

SIGNS = (
    ("SLURM_STEP_NUM_TASKS", lambda value: value.isdecimal() and int(value) > 1),
    ("OMPI_COMM_WORLD_SIZE", lambda value: value.isdecimal() and int(value) > 1),
    ("TPU_WORKER_HOSTNAMES", lambda value: "," in value),
    ("TPU_PROCESS_ADDRESSES", lambda value: "," in value),
    ("MEGASCALE_COORDINATOR_ADDRESS", bool),
)
"""Variables by which Slurm, Open MPI, and TPU jobs on Kubernetes mark a process as one of several."""

TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def _in_cluster() -> bool:
    """Whether the environment says that this process is one of several, or may be."""
    if any(holds(os.environ.get(name, "")) for name, holds in SIGNS):
        return True
    # Workers of a TPU pod learn it from a service of their host, which JAX asks.
    has_tpu = any(Path(device).exists() for device in TPU_DEVICES)
    wanted = os.environ.get("JAX_PLATFORMS", "tpu") == "tpu" and "TPU_SKIP_MDS_QUERY" not in os.environ
    return has_tpu and wanted and importlib.util.find_spec("libtpu") is not None


@contextmanager
def together(cluster: Cluster) -> Iterator[None]:
    """Join the other processes, where there are any, for the ``with`` block.

    A process that fails inside the block prints its line and ends at once with its exit code; an orderly
    exit would wait for the others for ever. The others notice within :data:`HEARTBEAT_SECONDS` and end with
    exit code 75, which asks for the same command again, or with the abort of JAX's coordination service.

    Raises:
      UserError: the other processes cannot be reached.
    """
    if not cluster.coordinator and not _in_cluster():
        yield
        return
    named = (
        {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.processes,
            "process_id": cluster.process,
        }
        if cluster.coordinator
        else {}
    )
    try:
        jax.distributed.initialize(
            **named,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from None
    try:
        yield
    except BaseException as error:
        if not several():
            raise
        _end(error)
    jax.distributed.shutdown()


def _end(error: BaseException) -> None:
    """Exit at once: an ordinary exit would wait for the others at a barrier."""
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        error = Preempted(f"another process is gone or out of reach: run the same command again ({error})")
    code = 1
    if isinstance(error, REPORTED_IN_ONE_LINE):
        line, code = exit_report(error)
        print(f"error: process {jax.process_index()}: {line}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Block until every process has reached this place."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def any_of_all(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes must call this."""
    if not several():
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_first(value: int) -> int:
    """The first process's value; all processes must call this."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def to_host(tree: PyTree) -> PyTree:
    """Gather every leaf whole as a NumPy array; all processes must call this."""
    if not several():
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def own_rows(sharding: Sharding, count: int) -> frozenset[int]:
    """Which of ``count`` rows lie on devices of this process."""
    parts = sharding.addressable_devices_indices_map((count,)).values()
    return frozenset(i for part in parts if part is not None for i in range(count)[part[0]])


def place(tree: PyTree, sharding: Sharding) -> PyTree:
    """Put host arrays on the devices of all processes; each process places its part, and needs no other."""
    if not several():
        return jax.device_put(tree, sharding)

    def of_leaf(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(of_leaf, tree)
