"""What every test runs under: eight devices, strict dtypes, no rank promotion, checked shapes."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile much and run little: machine code is not worth optimising. What XLA makes of the
# program, which some tests look at, is the same.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
given = os.environ.get("XLA_FLAGS", "")
missing = [flag for flag in FLAGS if flag.split("=")[0] not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()

if all(importlib.util.find_spec(name) for name in ("jaxtyping", "beartype")):
    from jaxtyping import install_import_hook

    import tests.shape_check  # noqa: F401  # the hook below looks it up by name

    install_import_hook("milora_jax", "tests.shape_check.check")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = ("training/test_faults.py", "test_end_to_end.py", "training/test_methods_train.py")
"""Files that take minutes: they go first, or one worker would run them last while the other waits."""


@pytest.hookimpl(tryfirst=True)  # before those that nobody asked for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort out the sweeps; the longest files first, all others, and the tests of a file, in their order."""
    for item in items:
        sweep = item.get_closest_marker("sweep")
        if sweep is not None and not any(word in item.name.partition("[")[2] for word in sweep.args):
            item.add_marker(pytest.mark.thorough)
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the checkout; they are no part of the project."""
    folder = Path(os.environ.get("MILORA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}, or in the folder that MILORA_DATA names")
    return folder
