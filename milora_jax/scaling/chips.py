"""Figures of chips, from the vendors' specifications."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      memory: bytes of HBM; the compiler reserves some of it.
      flops: bfloat16 floating-point operations per second.
      link: bytes per second to other chips, all links of a chip together.
    """

    memory: int
    flops: float
    link: float


CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 200e9),
    "v5p": Chip(95 * GIB, 459e12, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 448e9),
    "tpu7x": Chip(96 * GIB, 1153e12, 600e9),
}
"""From Cloud TPU's system architecture pages; a tpu7x chip is two devices with half its figures each."""
