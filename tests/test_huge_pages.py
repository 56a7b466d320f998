"""A command line starts itself anew for huge pages, once, and nobody who started it can tell."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from milora_jax.commands import huge_pages
from tests.paths import ROOT

REPORT = """
import json, os, sys
from pathlib import Path
from milora_jax.commands import huge_pages

huge_pages.MODES = Path(os.environ["MODES"])
if __name__ == "__main__":
    starts = Path(os.environ["STARTS"])
    with starts.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    huge_pages.restart()
import signal, threading
print(json.dumps({
    "argv": sys.argv[1:], "optimize": sys.flags.optimize, "x": sorted(sys._xoptions), "warn": sys.warnoptions,
    "pid": os.getpid(), "tunables": os.environ.get("GLIBC_TUNABLES"), "stdin": sys.stdin.read(),
}), flush=True)
if "wait" in sys.argv:
    signal.pause()
sys.exit(7)
"""

LIBRARY, VERSION = platform.libc_ver()

needs_glibc = pytest.mark.skipif(
    LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="needs glibc 2.35"
)

ODD = ["--a=b c", "-m", "", "ü\n'\"", "--", "$HOME", "*", b"\xff".decode(errors="surrogateescape")]


def unset():
    """The environment without what says whether there are huge pages."""
    return {
        name: os.environ[name] for name in os.environ if name not in ("GLIBC_TUNABLES", huge_pages.SWITCH)
    }


@pytest.fixture
def program(tmp_path):
    """Starts the program above with a machine's modes of huge pages, and further variables."""
    (tmp_path / "report.py").write_text(REPORT)

    def start(*words, modes="always [madvise] never", command=None, **variables):
        (tmp_path / "modes").write_text(modes)
        (tmp_path / "starts").unlink(missing_ok=True)
        places = {"MODES": f"{tmp_path}/modes", "STARTS": f"{tmp_path}/starts", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, *(command or ["report.py"]), *words],
            cwd=tmp_path,
            env={**unset(), "JAX_PLATFORMS": "cpu", **places, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def answer(process, tmp_path, said=""):
    """What the program printed, and the process ids of its starts."""
    out, err = process.communicate(said, timeout=60)
    assert not err
    return json.loads(out), [int(line) for line in (tmp_path / "starts").read_text().split()]


@needs_glibc
def test_the_new_start_has_the_same_process_arguments_input_options_and_exit_code(program, tmp_path):
    command = ["-X", "dev", "-OWerror", "-Wignore::ImportWarning", "report.py"]
    process = program(*ODD, command=command)
    found, starts = answer(process, tmp_path, "what is read\n")
    assert found == {
        "argv": ODD,
        "optimize": 1,
        "x": ["dev"],
        "warn": ["default", "error", "ignore::ImportWarning"],
        "pid": process.pid,
        "tunables": "glibc.malloc.hugetlb=1",
        "stdin": "what is read\n",
    }
    assert starts == [process.pid] * 2, "one process, started twice"
    assert process.returncode == 7


@needs_glibc
def test_a_module_starts_anew_as_a_module(program, tmp_path):
    process = program("-m", "report", command=["-um", "report"])
    found, starts = answer(process, tmp_path)
    assert found["argv"] == ["-m", "report"]
    assert starts == [process.pid] * 2


@needs_glibc
def test_sigterm_reaches_the_process_that_was_started(program):
    process = program("wait")
    process.stdin.close()
    assert "hugetlb" in process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    process.stdout.close()
    process.stderr.close()


@needs_glibc
def test_tunables_of_the_user_are_kept(program, tmp_path):
    found, starts = answer(program(GLIBC_TUNABLES="glibc.malloc.arena_max=2"), tmp_path)
    assert found["tunables"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    assert len(starts) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {huge_pages.SWITCH: "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        {"JAX_PLATFORMS": "cuda,cpu"},
        {"LD_PRELOAD": "libjemalloc.so.missing"},
        {"modes": "[always] madvise never"},
        {"modes": "always madvise [never]"},
        {"command": ["-m", "trace", "--count", "--missing", "--coverdir=.", "report.py"]},
        {"command": ["-c", "import runpy; runpy.run_path('report.py', run_name='__main__')"]},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_it_is_started_once_where(settings, program, tmp_path):
    process = program(**settings)
    process.communicate("", timeout=60)
    assert (tmp_path / "starts").read_text().split() == [str(process.pid)]


def test_platforms(monkeypatch):
    assert huge_pages.on_cpu({"JAX_PLATFORMS": "cpu"})
    assert huge_pages.on_cpu({"JAX_PLATFORMS": "cpu,cuda"})
    assert not huge_pages.on_cpu({"JAX_PLATFORMS": "tpu,cpu"})
    for installed, expected in (("", True), ("jax_plugins", False), ("libtpu", False)):
        monkeypatch.setattr(
            huge_pages.importlib.util, "find_spec", lambda name, there=installed: name == there
        )
        assert huge_pages.on_cpu({}) is expected, installed


def test_a_refused_start_is_none(monkeypatch):
    monkeypatch.setattr(huge_pages, "_helps", lambda: True)
    monkeypatch.setattr(huge_pages, "_is_plain", lambda: True)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv(huge_pages.SWITCH, raising=False)
    asked = []

    def refuse(path, arguments, environment):
        asked.append((path, arguments, environment["GLIBC_TUNABLES"]))
        raise OSError(7, "Argument list too long")

    monkeypatch.setattr(os, "execve", refuse)
    huge_pages.restart()
    assert asked == [(sys.executable, [sys.executable, *sys.orig_argv[1:]], "glibc.malloc.hugetlb=1")]


NOTED = """
import os, sys
from pathlib import Path
import milora_jax.commands.huge_pages as pages

def noted(path, arguments, environment):
    print(*arguments[1:], "jax" in sys.modules, "numpy" in sys.modules, flush=True)
    os._exit(5)

pages.MODES = Path(os.environ["MODES"])
os.execve = noted
"""


@needs_glibc
@pytest.mark.parametrize(
    "command", ["train.py", "serve.py", "-m milora_jax.bench", "-m milora_jax.evaluation"]
)
def test_command_lines_begin_with_it(command, tmp_path):
    """They start anew before they import what takes seconds."""
    (tmp_path / "sitecustomize.py").write_text(NOTED)
    (tmp_path / "modes").write_text("always [madvise] never")
    places = {"MODES": f"{tmp_path}/modes", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        cwd=ROOT,
        env={**unset(), "JAX_PLATFORMS": "cpu", **places},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (5, f"{command} --help False False\n")
