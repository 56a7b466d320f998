"""Attention of a first pass: one function, whose back end depends on the platform.

==========  =====================================================================================
TPU         Pallas' splash attention (``base/splash.py``), for heads of 64 or 128, no prefix, and a
            window that is the same in all layers or longer than the rows
GPU         cuDNN, through ``jax.nn.dot_product_attention``, for 16-bit floats on Ampere or later, heads
            up to 128 and scores without a cap
elsewhere   ``base/blockwise.py``: the same sums in plain XLA
==========  =====================================================================================

A kernel that the compiler of the device refuses is not used there, which is one warning and no error. None of
them keeps scores between the passes. The results of the others are named for ``remat="products"``;
cuDNN's is not, so that the backward pass computes it again. tokamax, which chooses among kernels by itself,
is not used: it needs Python 3.12 and reads the command line's flags as its own.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from milora_jax.base import splash
from milora_jax.base.blockwise import blockwise
from milora_jax.base.ops import Scoring, Window, attention_mask
from milora_jax.errors import short
from milora_jax.shapes import Array, Bool, Float, Int

CUDNN_LARGEST_HEAD = 128
"""Widest head that cuDNN accepts on all supported GPUs."""

CUDNN_LEAST_CAPABILITY = (8, 0)
"""Compute capability of Ampere: a T4 (7.5) has no such kernels."""


@dataclass(frozen=True)
class DeviceLayout:
    """How queries, keys and values are divided over devices: XLA partitions its own products but no kernels.

    Attributes:
      mesh: the devices; None for a single device.
      rows, heads: mesh axes over which rows and heads are split.
      widths, experts: mesh axes over which F and the experts of a base are split.
      cudnn: whether the devices have cuDNN's kernels, see :func:`has_cudnn`.
      splash: whether TPUs compile the splash kernel, see :func:`has_splash`.
    """

    mesh: Mesh | None = None
    rows: str | tuple[str, ...] | None = None
    heads: str | tuple[str, ...] | None = None
    widths: str | tuple[str, ...] | None = None
    experts: str | None = None
    cudnn: bool = False
    splash: bool = True

    @property
    def row_parts(self) -> int:
        """Parts into which rows are split: a batch must be a multiple of it."""
        return _devices(self.mesh, self.rows)

    def heads_of(self, *numbers: int) -> str | tuple[str, ...] | None:
        """The mesh axes over which so many heads are split; None if they do not divide evenly."""
        parts = _devices(self.mesh, self.heads)
        return None if any(number % parts for number in numbers) else self.heads

    def widths_of(self, width: int) -> str | tuple[str, ...] | None:
        """The mesh axes over which F is split; None if they do not divide it evenly."""
        return None if width % _devices(self.mesh, self.widths) else self.widths


def _devices(mesh: Mesh | None, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in names)


def device_layout(devices: Collection[Any]) -> DeviceLayout | None:
    """The layout of a pass on one device; None for several devices, whose axes are unknown here."""
    device, *others = devices
    return None if others else DeviceLayout(cudnn=has_cudnn(device), splash=has_splash(device))


Attend = Callable[[Array, Array, Array, Array, Scoring, "Array | None", "Window | None"], Array]
"""The type of :func:`attention` with its ``layout`` bound, as a layer calls it."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    scoring: Scoring,
    segments: Int[Array, "B T"] | None = None,
    window: Window | None = None,
    layout: DeviceLayout | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, softmax in float32.

    Args:
      mask: true where a query may see a key; false for keys more than S - T places after the query. A query
        that may see no key (padding) gets a finite result without a meaning.
      scoring: the conversion of products to scores.
      segments: segments of the tokens, 0 for padding, where the mask means causality within segments only.
      window: sliding window within the mask.
      layout: allows kernels, and says how they are divided; None uses XLA's own products only.
    """
    if layout is None:
        return blockwise(q, k, v, mask, window, scoring)
    if layout.cudnn and scoring.cap is None and cudnn_serves(q, k):
        seen = mask if window is None else mask & window.seen()
        return jax.nn.dot_product_attention(
            q, k, v, mask=seen[:, None], scale=scoring.scale, implementation="cudnn"
        )
    size = None if window is None else window.size
    if segments is None or not layout.splash or not splash.serves(q) or isinstance(size, Array):
        return blockwise(q, k, v, mask, window, scoring)
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        mask,
        segments,
        tpu=lambda q, k, v, mask, segments: _splash(layout, q, k, v, segments, size, scoring),
        default=lambda q, k, v, mask, segments: blockwise(q, k, v, mask, window, scoring),
    )


def has_cudnn(device: Any) -> bool:
    """Whether a device has cuDNN's attention: not a T4, not a card of another vendor, and not where its
    compiler refuses it."""
    if device.platform != "gpu":
        return False
    try:
        capability = tuple(int(part) for part in str(device.compute_capability).split("."))
    except (AttributeError, ValueError):
        return False
    return capability >= CUDNN_LEAST_CAPABILITY and compiles(device, "cuDNN's attention", _cudnn)


def has_splash(device: Any) -> bool:
    """Whether a device compiles the splash kernel; true where there is no TPU, which does not run it."""
    return device.platform != "tpu" or compiles(device, "splash attention", _splash_on_one)


@functools.cache
def compiles(device: Any, name: str, kernel: Callable[[Array, Array, Array, Array], Array]) -> bool:
    """Whether a device compiles a kernel of attention and its gradient; warns with its error where not.

    One of several processes must not decide for itself: all run the same program, so nothing is tried there.

    Args:
      kernel: of q, k and v ``[B, T, N, H]`` and segments ``[B, T]``.
    """
    if jax.process_count() > 1:
        return True
    place = jax.sharding.SingleDeviceSharding(device)
    heads = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16, sharding=place)
    segments = jax.ShapeDtypeStruct((1, 128), jnp.int32, sharding=place)

    def loss(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return kernel(q, k, v, segments).astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads, heads, heads, segments).compile()
    except Exception as error:  # a compiler's or a driver's, of any kind
        warnings.warn(f"{name} is not used on {device}: {short(error)}", RuntimeWarning, stacklevel=2)
        return False
    return True


def _cudnn(q: Array, k: Array, v: Array, segments: Array) -> Array:
    mask = attention_mask(segments, segments, 0)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _splash_on_one(q: Array, k: Array, v: Array, segments: Array) -> Array:
    return splash.splash(q, k, v, segments, None, Scoring(q.shape[-1] ** -0.5, None))


def cudnn_serves(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> bool:
    """Whether cuDNN accepts arrays of these shapes; for odd lengths it has no gradient under a mask."""
    small = q.dtype in (jnp.bfloat16, jnp.float16)
    suits = q.shape[-1] % 8 == 0 and q.shape[-1] <= CUDNN_LARGEST_HEAD
    return small and suits and q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0


def _splash(
    layout: DeviceLayout, q: Array, k: Array, v: Array, segments: Array, window: int | None, scoring: Scoring
) -> Float[Array, "B T N H"]:
    """Splash attention, computed by every device on its own rows and heads."""
    kernel = functools.partial(splash.splash, window=window, scoring=scoring)
    if layout.mesh is None or layout.mesh.size == 1:
        return kernel(q, k, v, segments)
    by_head = jax.P(layout.rows, None, layout.heads_of(q.shape[2], k.shape[2]), None)
    return jax.shard_map(
        kernel,
        mesh=layout.mesh,
        in_specs=(by_head, by_head, by_head, jax.P(layout.rows, None)),
        out_specs=by_head,
        check_vma=False,
    )(q, k, v, segments)
