"""Buffers in which a leaf is assembled: host memory that CPU devices share, or arrays on devices."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.shapes import Array, Int

ALIGNMENT = 64
"""Bytes to which XLA aligns buffers: a CPU device uses a host array with this alignment without a copy."""

Device = Any
"""A ``jax.Device``, which type checkers read as a variable."""

Box = tuple[slice, ...]
"""A part of an array, one slice per axis."""


def shape_of(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(side.stop - side.start for side in box)


@runtime_checkable
class Buffer(Protocol):
    """The values of an array, which several threads put box by box."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        ...

    def region(self, box: Box) -> np.ndarray:
        """Memory for the values of a box, to be filled and then put."""
        ...

    def put(self, box: Box, values: np.ndarray) -> None:
        """Store the values of a box."""
        ...

    def arrays(self) -> list[jax.Array]:
        """The array on each device, once every box has been put."""
        ...


def buffer_for(shape: tuple[int, ...], dtype: np.dtype, devices: Sequence[Device]) -> Buffer:
    """The buffer that suits the devices, which are of one kind."""
    kind = HostBuffer if devices[0].platform == "cpu" else DeviceBuffer
    return kind(shape, dtype, devices)


class HostBuffer:
    """An array in host memory, which CPU devices use without a copy."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: Sequence[Device]) -> None:
        """Reserve the memory."""
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self.dtype: np.dtype = dtype
        self._devices = devices
        self._values = raw[start : start + size].view(dtype).reshape(shape)

    def region(self, box: Box) -> np.ndarray:
        """The box itself."""
        return self._values[box]

    def put(self, box: Box, values: np.ndarray) -> None:
        """Copy the values, unless they are the box itself."""
        if not np.may_share_memory(self._values, values):
            self._values[box] = values

    def arrays(self) -> list[jax.Array]:
        """The memory as an array of every device."""
        return [jax.device_put(self._values, device) for device in self._devices]


class DeviceBuffer:
    """An array on each of some devices, to which it is copied box by box.

    The host never holds more of a stacked leaf than the tensors that its threads are reading.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: Sequence[Device]) -> None:
        """Reserve nothing yet."""
        self.dtype: np.dtype = dtype
        self._shape = shape
        self._arrays: dict[Device, jax.Array | None] = dict.fromkeys(devices)
        self._lock = threading.Lock()  # an update donates the array before it

    def region(self, box: Box) -> np.ndarray:
        """New memory."""
        return np.empty(shape_of(box), self.dtype)

    def put(self, box: Box, values: np.ndarray) -> None:
        """Copy the values to every device, and wait until they are there."""
        starts = np.array([side.start for side in box], np.int32)
        for device in self._arrays:
            part = jax.device_put(values, device)
            with self._lock:
                if part.shape != self._shape:  # a whole array needs no update
                    part = _updated(self._reserved(device), part, starts)
                self._arrays[device] = jax.block_until_ready(part)

    def arrays(self) -> list[jax.Array]:
        """The arrays."""
        return [self._reserved(device) for device in self._arrays]

    def _reserved(self, device: Device) -> jax.Array:
        found = self._arrays[device]
        return jnp.zeros(self._shape, self.dtype, device=device) if found is None else found


@functools.partial(jax.jit, donate_argnums=0)
def _updated(whole: jax.Array, part: jax.Array, starts: Int[Array, " axes"]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part, [starts[axis] for axis in range(whole.ndim)])
