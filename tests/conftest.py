"""What every test runs under: eight devices, strict dtypes, no rank promotion, checked shapes."""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile much and run little: machine code is not worth optimising. What XLA makes of the
# program, which some tests look at, is the same.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# Without the emitters in MLIR a step compiles in a quarter of the time, but some of its fusions are others:
# tests that look at a program ask for them again (tests/programs.py). Later releases know no such flag.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
given = os.environ.get("XLA_FLAGS", "")
missing = [flag for flag in FLAGS if flag.split("=")[0] not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()

# Tests, their workers and the command lines that they start compile the same programs: JAX's persistent cache
# lets each be compiled once. It is empty at the start, unless whoever starts pytest gives one of theirs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.mkdtemp(prefix="milora-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

if all(importlib.util.find_spec(name) for name in ("jaxtyping", "beartype")):
    from jaxtyping import install_import_hook

    import tests.shape_check  # noqa: F401  # the hook below looks it up by name

    install_import_hook("milora_jax", "tests.shape_check.check")

import jax
import pytest

from milora_jax.commands.command_line import run_command

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = (
    *("training/test_faults.py", "test_recipes.py", "test_end_to_end.py", "serving/test_http.py"),
    *("training/test_methods_train.py", "training/test_step.py"),
)
"""Files that take minutes: they go first, or one worker would run them last while the other waits. One of
those with a server does too, or both workers would compile the programs of a server at the same time."""

IDLE_WORDS = pytest.StashKey[list[tuple[str, str]]]()
"""(test, word) of sweeps none of whose cases has the word in its id."""


@pytest.hookimpl(tryfirst=True)  # before those that nobody asked for are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort out the sweeps; the longest files first, all others, and the tests of a file, in their order."""
    used: dict[tuple[str, str], bool] = {}
    for item in items:
        sweep = item.get_closest_marker("sweep")
        if sweep is None:
            continue
        test, _, case = item.nodeid.partition("[")
        chosen = [word for word in sweep.args if word in case]
        if not chosen:
            item.add_marker(pytest.mark.thorough)
        for word in sweep.args:
            used[test, word] = used.get((test, word), False) or word in chosen
    by_hand = any("[" in argument for argument in config.args)
    config.stash[IDLE_WORDS] = [] if by_hand else [key for key, was_used in used.items() if not was_used]
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.fixture
def idle_words(pytestconfig: pytest.Config) -> list[tuple[str, str]]:
    """What of the sweeps that were collected chooses no case."""
    return pytestconfig.stash[IDLE_WORDS]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command ends with when it is refused, run in this process."""

    def line_of(main: Callable[..., None], *arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: main([str(argument) for argument in arguments]))
        said = capsys.readouterr()
        assert (ended.value.code, said.out.strip()) == (2, "")
        (line,) = said.err.splitlines()
        assert line.startswith("error: ")
        return line

    return line_of


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the checkout; they are no part of the project."""
    folder = Path(os.environ.get("MILORA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}, or in the folder that MILORA_DATA names")
    return folder


MAPS = Path("/proc/self/maps")
SERVING = Path(__file__).parent / "serving"

MOST_MAPS = 20_000
"""A compiled program has some hundred memory maps, and Linux allows a process 65,530 by default: at the limit
XLA breaks off the process. A worker compiles enough for that on its way through all files, and the programs
take gigabytes."""


@pytest.hookimpl(trylast=True)  # after the fixtures of the file have been torn down
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drop compiled programs between two files before they are too many."""
    if nextitem is None or nextitem.path == item.path or not MAPS.is_file():
        return
    if nextitem.path.parent == item.path.parent == SERVING:
        return  # the server that these files share would compile its programs anew, which tests of it count
    if MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
