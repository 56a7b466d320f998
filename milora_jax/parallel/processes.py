"""Several processes, one per host of a cluster, that run the same program on all devices together.

Every process reads the same files, takes the same steps and scores the same answers; only the first one
writes to the workdir, which is on a file system that all of them see, or in a bucket.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

import milora_jax
from milora_jax.cluster import Cluster
from milora_jax.errors import EXIT_PREEMPTED, REPORTED_IN_ONE_LINE, Preempted, UserError, exit_report
from milora_jax.preemption import watch_for_preemption
from milora_jax.types import PyTree

JOIN_SECONDS = 300
"""Seconds that a process waits for the others at the start."""

HEARTBEAT_SECONDS = 30
"""Seconds without a heartbeat after which a process is taken for dead and all others end."""

SHUTDOWN_SECONDS = 60
"""Seconds that a finished process waits for the others."""

LAST_WORDS_SECONDS = 1.0
"""Seconds by which the first process ends later than the others when all fail alike: the coordination service
ends with it, and would abort them before they have printed their line."""

LONGEST_SHOWN = 60
"""Letters of a value that an error shows."""

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy", "transformers", "tokenizers")

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
    # Left to itself, JAX would abort here with a stack trace.
    late = threading.Timer(JOIN_SECONDS, _nobody_came)
    late.start()
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from None
    finally:
        late.cancel()
    try:
        yield
    except BaseException as error:
        if not several():
            raise
        _end(error)
    wait_for_all("end")  # the first process may write for longer than a shutdown waits
    jax.distributed.shutdown()


def _nobody_came() -> None:
    print(
        f"error: the other processes did not all come within {JOIN_SECONDS} s: start the same command on "
        "every host at about the same time",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_PREEMPTED)


def _end(error: BaseException) -> None:
    """Exit at once: an ordinary exit would wait for the others at a barrier."""
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        error = Preempted(f"another process is gone or out of reach: run the same command again ({error})")
    code = 1
    if isinstance(error, REPORTED_IN_ONE_LINE):
        line, code = exit_report(error)
        print(f"error: process {jax.process_index()}: {line}", file=sys.stderr, flush=True)
        if is_first():
            time.sleep(LAST_WORDS_SECONDS)
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


@contextmanager
def watch_for_preemption_of_any() -> Iterator[Callable[[], bool]]:
    """As ``watch_for_preemption``, for all processes together: SIGTERM or Ctrl-C in one of them stops all.

    JAX's preemption service passes the notice on and settles at which call all stop, so that none of them
    waits for its devices to ask the others. Its handler of SIGTERM is the one that
    ``jax.distributed.initialize`` has installed.

    Yields:
      A function that returns whether to stop. All processes must call it equally often; from the call on at
      which it returns True in one of them it returns True in all.
    """
    if not several():
        with watch_for_preemption() as preempted:
            yield preempted
        return
    from jax.experimental import multihost_utils

    calls, reached = itertools.count(1), False

    def asked() -> bool:
        nonlocal reached
        reached = reached or multihost_utils.reached_preemption_sync_point(next(calls))
        return reached

    def pass_on(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, old)  # a second Ctrl-C interrupts
        os.kill(os.getpid(), signal.SIGTERM)

    old = signal.getsignal(signal.SIGINT)
    if old is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, pass_on)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, old)


def from_first(value: int) -> int:
    """The first process's value; all processes must call this."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def float_from_first(value: float) -> float:
    """The first process's value to the bit; all processes must call this."""
    parts = [from_first(int(part)) for part in np.array([value], np.float64).view(np.int32)]
    return float(np.array(parts, np.int32).view(np.float64)[0])


def by_dotted_name(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary.

    >>> by_dotted_name({"train": {"seed": 0}, "name": "x"})
    {'train.seed': 0, 'name': 'x'}
    """
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= by_dotted_name(value, f"{prefix}{key}.")
    return found


def require_same(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Refuse to go on if a process was started with something else than the first; all must call this.

    Args:
      facts: makes JSON values by name, which may be nested; not called where there is one process.

    Raises:
      UserError: in every process, with the first process and the first fact that differ.
    """
    if not several():
        return
    first, *others = map(json.loads, _texts_of_all(json.dumps(by_dotted_name(facts()))))
    for process, theirs in enumerate(others, 1):
        for name in {**first, **theirs}:
            said = [_shown(values.get(name)) for values in (first, theirs)]
            if first.get(name) != theirs.get(name):
                raise UserError(
                    f"{name} is {said[0]} in process 0 and {said[1]} in process {process}: expected the same "
                    "command, the same files and the same packages on every host"
                )


def package_versions() -> dict[str, str | None]:
    """The installed packages on which results depend, as facts for :func:`require_same`."""
    found: dict[str, str | None] = {"version of milora_jax": milora_jax.__version__}
    for name in PACKAGES:
        try:
            found[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {name}"] = None
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _texts_of_all(text: str) -> list[str]:
    """A text of every process, in their order; all must call this."""
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(mine), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def gather(tree: PyTree) -> PyTree:
    """Start to give every process all of each leaf, and return at once; all processes must call this.

    A leaf that a process has whole already, as all are where there is one process, is returned as it is.
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"{sharding} is not laid out over a mesh")
        return jax.jit(_same, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(leaf)

    return jax.tree.map(whole, tree) if several() else tree


def _same(leaf: jax.Array) -> jax.Array:
    return leaf


def to_host(tree: PyTree) -> PyTree:
    """Gather every leaf whole as a NumPy array; all processes must call this."""
    return jax.device_get(gather(tree))


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
