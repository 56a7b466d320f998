"""Checks of the devices, their memory, and whether a run fits into it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax

from milora_jax.adapters.hooks import abstract_params
from milora_jax.adapters.registry import adapter_shape
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding
from milora_jax.doctor.subject import Subject
from milora_jax.parallel.mesh import check_meshes
from milora_jax.scaling.chips import GIB
from milora_jax.scaling.plan import base_bytes

STATE_BYTES = {"adamw": 16, "adafactor": 8}
"""Bytes per trained parameter: itself, its gradient and AdamW's two moments in float32; Adafactor's rows and
columns are small beside them."""

ROOM = 0.7
"""Share of the memory that base and state may take and still leave room for activations and logits."""

ACCELERATORS = {"/dev/nvidia0": "cuda12", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
"""Device files of accelerators in Linux, and the extra with which JAX uses each."""

MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files that hold a container's memory limit."""


def host_memory() -> int:
    """Bytes of the host's memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path(name).read_text().strip() for name in MEMORY_LIMITS if Path(name).is_file()]
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])


def memory_per_device() -> float:
    """Bytes of memory of each device; CPU devices share the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return host_memory() / jax.local_device_count()


def device_findings() -> Iterator[Finding]:
    """Report the devices of JAX."""
    kinds = Counter(device.device_kind for device in jax.devices())
    said = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    platform = jax.default_backend()
    yield Finding(OK, "devices", f"{said} ({platform}), {memory_per_device() / GIB:.1f} GiB each")
    chosen = os.environ.get("JAX_PLATFORMS") == "cpu"
    idle = [(device, extra) for device, extra in ACCELERATORS.items() if Path(device).exists()]
    if platform == "cpu" and idle and not chosen:
        device, extra = idle[0]
        hint = f"JAX sees no accelerator: pip install -e '.[{extra}]'"
        yield Finding(WARN, "devices", f"{device} is there, but {hint}")


def mesh_findings(subject: Subject) -> Iterator[Finding]:
    """Check that the devices, the batches and the model can be divided as the config asks."""
    config, mesh = subject.config, subject.mesh
    check_meshes(mesh, config, subject.model)
    shown = {axis: size for axis, size in mesh.shape.items() if axis != "expert" or size > 1}
    sizes = " ".join(f"{axis}={size}" for axis, size in shown.items())
    yield Finding(OK, "mesh", f"{sizes} over {mesh.size} device(s)")


def memory_findings(subject: Subject) -> Iterator[Finding]:
    """Check by arithmetic that base and training state fit; activations are not counted."""
    config, shards = subject.config, subject.mesh.shape["fsdp"] * subject.mesh.shape["tensor"]
    base = base_bytes(config, subject.model, subject.mesh.shape["expert"]) / shards
    # The size before pruning, for methods that prune: AdaLoRA begins with twice its budget.
    trained = jax.tree.leaves(abstract_params(subject.method, adapter_shape(subject.model)))
    state = float(STATE_BYTES[config.train.optimizer]) * sum(leaf.size for leaf in trained)
    yield fit_finding(base, state, memory_per_device(), scored=bool(config.data.test))


def fit_finding(base: float, state: float, memory: float, scored: bool) -> Finding:
    """Check that a run fits a device.

    Args:
      base, state, memory: bytes per device.
      scored: whether the run scores test rows, which needs the base in a second layout.
    """
    train, most = base + state, state + base * (2 if scored else 1)
    said = f"base {_gib(base)} and training state {_gib(state)} of {_gib(memory)} per device"
    if train > memory:
        do = "--config.model.dtype=bfloat16, --config.model.quantize=nf4 or a larger --config.mesh.fsdp"
        return Finding(FAIL, "memory", f"{said}: does not fit; {do}")
    if most > memory:
        do = "leave data.test empty; python -m milora_jax.evaluation holds it once"
        return Finding(WARN, "memory", f"{said}: scoring holds the base twice, {_gib(most)}; {do}")
    if train > ROOM * memory:
        do = "python -m milora_jax.parallel aot compiles the whole step; --config.train.accumulate needs less"
        return Finding(WARN, "memory", f"{said}: little is left for activations; {do}")
    return Finding(OK, "memory", f"{said}; activations come on top")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
