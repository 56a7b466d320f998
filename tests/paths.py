"""Where the checkout and the package lie, and what a command line runs under that a test starts there."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "milora_jax"


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The tests' own (see conftest.py), for a process of so many devices: it shares their programs."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), **more}
