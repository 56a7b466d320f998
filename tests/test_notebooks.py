"""The notebooks: well-formed, small, with outputs that are fit to be read, and (slowly) run anew."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

FOLDER = ROOT / "notebooks"
NAMES = (
    *("finetune_gemma_or_llama", "latency", "preferences", "quickstart", "routing_maps"),
    "serve_many_tenants",
)

MOST_BYTES = 300_000
"""Of a notebook with its outputs."""

TOPS = ("home", "root", "tmp", "var", "opt", "usr", "work", "Users", "content", "mnt")
MACHINE = re.compile(rf"(?<![\w.<])/({'|'.join(TOPS)})/[\w.]|\b[A-Z]:\\\w")
"""A path that means something on one machine only."""


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def cells(name, kind):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == kind]


def texts(output):
    """All that an output says in words."""
    yield "".join(output.get("text", ""))
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield "".join(data)


def test_there_is_every_notebook_and_no_other():
    assert sorted(path.stem for path in FOLDER.iterdir() if path.suffix == ".ipynb") == sorted(NAMES)
    documented = (ROOT / "docs" / "notebooks.md").read_text()
    assert all(f"notebooks/{name}.ipynb" in documented for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_well_formed(name):
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"code", "markdown"}
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")
    for cell in cells(name, "code"):
        ast.parse("".join(cell["source"]))


@pytest.mark.parametrize("name", NAMES)
def test_the_format_of_a_notebook_is_valid(name):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")
    nbformat.validate(nbformat.from_dict(read(name)))


def test_the_first_cell_installs_and_shows_the_device():
    first = {"".join(cells(name, "code")[0]["source"]) for name in NAMES}
    assert len(first) == 1, "one first cell for all"
    (source,) = first
    assert source.startswith('REPOSITORY = ""')
    assert '"pip", "install"' in source
    assert "jax.devices()" in source


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_those_of_a_run_from_top_to_bottom(name):
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        assert base64.b64decode("".join(picture)).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_small_and_say_nothing_of_the_machine(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    for cell in cells(name, "code"):
        for output in cell["outputs"]:
            for text in texts(output):
                assert not MACHINE.search(text), text
                assert "Traceback" not in text
    for cell in read(name)["cells"]:
        assert not MACHINE.search("".join(cell["source"]))


def test_a_path_of_a_machine_is_known_when_seen():
    assert len(TOPS) == 10
    for top in TOPS:
        for text in (f"in /{top}/me/x", f"'/{top}/a1'", f"/{top}/.cache"):
            assert MACHINE.search(text), text
    assert MACHINE.search("at C:\\Users")
    for text in ("runs/tmp/x", "http://127.0.0.1/tmp", "a/b", "</usr>", "hf://google/gemma"):
        assert not MACHINE.search(text), text


@pytest.mark.thorough
def test_the_cells_fit_the_package_of_today(tmp_path):
    """Names and types; notebooks are run by hand, and a changed signature would be seen late."""
    pytest.importorskip("pyright", reason="needs the extra 'dev'")
    for name in NAMES:
        source = "\n".join("".join(cell["source"]) for cell in cells(name, "code"))
        (tmp_path / f"{name}.py").write_text(f"# pyright: basic, reportMissingImports=false\n{source}\n")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(NAMES)
    wrong = [
        f"{Path(each['file']).stem}, line {each['range']['start']['line']}: {each['message']}"
        for each in found["generalDiagnostics"]
        # Cells do not ask whether something is None: where it is, they fail.
        if each["severity"] == "error" and "None" not in each["message"]
    ]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    pytest.importorskip("nbmake", reason="needs the extra 'notebooks'")
    # A copy of the project: a run of an earlier time would have nothing left to do.
    ignored = shutil.ignore_patterns("runs", ".*", "__pycache__", "docs", "tests")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PYTHONPATH")}
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", tmp_path / "clone"]
    options = ["-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=1800"]
    done = subprocess.run(
        [*command, *options, tmp_path / "clone" / "notebooks" / f"{name}.ipynb"],
        cwd=tmp_path / "clone",
        env={**kept, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
