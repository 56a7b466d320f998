"""The machine of a measurement, and the most that it can do."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

import milora_jax


def describe(peer: dict[str, str] | None = None) -> dict[str, Any]:
    """Device, versions and command line, for the end of a report.

    Args:
      peer: versions of the peer, if one ran.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "backend": jax.default_backend(),
        "versions": {
            "milora_jax": milora_jax.__version__,
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "flax": flax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            **(peer or {}),
        },
        "command": "python -m milora_jax.bench " + " ".join(sys.argv[1:]),
    }


def measure_bandwidth() -> float:
    """Measure the bytes per second at which the device reads a large array once."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**30
    array = jnp.ones((size // 4,), jnp.float32)
    return size / _second_run(jax.jit(jnp.sum), array)


def measure_matmul(dtype: str) -> float:
    """Measure the floating-point operations per second of a large square matrix product."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    array = jnp.ones((size, size), jnp.dtype(dtype))
    return 2 * size**3 / _second_run(jax.jit(jnp.matmul), array, array)


def _second_run(function: Callable, *arrays: jax.Array) -> float:
    function(*arrays).block_until_ready()
    begin = time.perf_counter()
    function(*arrays).block_until_ready()
    return time.perf_counter() - begin


def peak_memory() -> int:
    """Most bytes used so far: of the first device where it counts them, else resident in this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    if (status := Path("/proc/self/status")).is_file():
        # On Linux ``getrusage`` includes the parent's peak if this process was forked from it.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
