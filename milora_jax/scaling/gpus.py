"""GPUs that are not attached, described to XLA's compiler by the vendor's figures.

The compiler can read the properties of a card from a text (``GpuTargetConfigProto``) instead of a device.
Without the card it autotunes nothing: the program differs from the one that would run there, but its memory
is much the same. Attention is compiled in its plain form, because cuDNN is used only where a GPU is attached.
"""

from __future__ import annotations

from dataclasses import dataclass

from milora_jax.errors import require
from milora_jax.scaling.chips import GIB, Chip

PER_HOST = 8
"""Cards of a host, in a topology of several hosts."""

PREALLOCATED = 0.75
"""Share of a card's memory that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)."""


@dataclass(frozen=True)
class Gpu(Chip):
    """One GPU card.

    Attributes:
      capability: CUDA's compute capability.
      cores: streaming multiprocessors.
      bandwidth: bytes per second of its memory.
      cache: bytes of the second-level cache.
      shared: bytes of shared memory of a multiprocessor.
      clock: GHz.
    """

    capability: tuple[int, int]
    cores: int
    bandwidth: float
    cache: int
    shared: int
    clock: float

    def described(self, name: str) -> str:
        """The ``GpuTargetConfigProto`` text that the compiler reads."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores}
              fpus_per_core: {64 if self.capability in ((7, 5), (8, 0)) else 128}
              clock_rate_ghz: {self.clock}
              memory_bandwidth: {int(self.bandwidth)}
              device_memory_size: {self.memory}
              l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared - (0 if self.capability == (7, 5) else 1024)}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_core_limit: {1024 if self.capability == (7, 5) else 2048}
              threads_per_block_limit: 1024
              threads_per_warp: 32
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
        """


KIB, MIB = 2**10, 2**20

GPUS = {
    "t4": Gpu(15 * GIB, 65e12, 16e9, (7, 5), 40, 320e9, 4 * MIB, 64 * KIB, 1.59),
    "a100": Gpu(80 * GIB, 312e12, 300e9, (8, 0), 108, 2039e9, 40 * MIB, 164 * KIB, 1.41),
    "h100": Gpu(80 * GIB, 989e12, 450e9, (9, 0), 132, 3350e9, 50 * MIB, 228 * KIB, 1.98),
    "h200": Gpu(141 * GIB, 989e12, 450e9, (9, 0), 132, 4800e9, 50 * MIB, 228 * KIB, 1.98),
}
"""NVIDIA's SXM cards by their data sheets, and the T4, whose peak is that of float16. Operations are dense
ones per second; links are the bytes per second that a card receives over NVLink or PCIe."""


def layout_of(topology: str) -> tuple[str, str]:
    """Split a topology such as ``h200:8`` into the card's name and the layout, slices x hosts x cards.

    Raises:
      UserError: the number of cards is not a number, or not a whole number of hosts of eight.
    """
    name, _, count = topology.partition(":")
    cards = int(count) if count.isdecimal() else 0
    whole = cards >= 1 and (cards <= PER_HOST or cards % PER_HOST == 0)
    require(whole, "--topology", topology, f"a number of cards, 1 to {PER_HOST} or a multiple of {PER_HOST}")
    return name, f"1x{max(1, cards // PER_HOST)}x{min(cards, PER_HOST)}"
