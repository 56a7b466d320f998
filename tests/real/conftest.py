"""The published model, loaded once for all tests of it, and the figures that they leave behind."""

import json
import os
import warnings
from pathlib import Path

import jax
import pytest

from milora_jax.base.modules import decode_layout
from milora_jax.config import Config, DataSection, MeshSection, ModelSection, TrainSection
from milora_jax.parallel.mesh import make_mesh
from milora_jax.training import prepare
from milora_jax.training.progress import planned_steps
from milora_jax.training.step import make_steps
from tests.real.figures import Figure, setup, table
from tests.storage.torch_logits import torch_model
from tests.training.runs import ROOT, write_rows
from tests.training.short_runs import silent

VARIABLE = "MILORA_REAL_MODEL"
FIGURES = "MILORA_REAL_FIGURES"
"""Names a file that gets a line of JSON for every figure."""

STEPS = 3


@pytest.fixture(scope="session")
def folder():
    """The directory of the model."""
    given = os.environ.get(VARIABLE)
    if not given:
        pytest.skip(f"needs a published model: {VARIABLE} names no Hugging Face directory")
    path = Path(given).resolve()
    assert (path / "config.json").is_file(), f"{VARIABLE} is {given!r}, which has no config.json"
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"compares with {name}: pip install torch -e '.[parity]'")
    if FIGURES in os.environ:
        _append(setup(path))
    return path


def _append(figures):
    with open(os.environ[FIGURES], "a") as file:
        file.writelines(f"{figure.to_json()}\n" for figure in figures)


@pytest.fixture
def record(record_property):
    """Keeps a figure: ``record(part, what, value, wanted)``."""

    def keep(part, what, value, wanted=""):
        figure = Figure(part, what, value if isinstance(value, str) else float(value), wanted)
        record_property("figure", figure.to_json())
        if FIGURES in os.environ:
            _append([figure])

    return keep


def pytest_terminal_summary(terminalreporter):
    """The figures of this run as a table."""
    figures = [
        Figure(**json.loads(value))
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "figure" and report.when == "call"
    ]
    if figures:
        terminalreporter.section("figures of the published model")
        terminalreporter.write_line(table(figures))


@pytest.fixture(scope="session")
def one_device():
    """``prepare_run`` on one of the eight devices that tests have: eight would hold eight bases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "make_mesh", lambda settings: make_mesh(settings, jax.devices()[:1]))
        yield


def config_of(folder, rows, template="alpaca", **data):
    """A run of a few steps on the rows of a file."""
    return Config(
        model=ModelSection(path=str(folder)),
        data=DataSection(train=str(rows), template=template, **{"max_length": 96, "dev_limit": 4, **data}),
        train=TrainSection(
            max_steps=STEPS,
            batch_size=4,
            learning_rate=1e-2,
            warmup_share=0.0,
            eval_every=STEPS,
            save_every=STEPS,
            log_every=1,
            coefficient_every=2,
        ),
        mesh=MeshSection(data=1),
    )


@pytest.fixture(scope="session")
def run(folder, one_device, tmp_path_factory):
    """A run of few steps on short rows, ready to train; its base is that of all tests."""
    rows = tmp_path_factory.mktemp("rows")
    write_rows(rows)
    return prepare.prepare_run(config_of(folder, rows / "rows.jsonl"), None, silent)


@pytest.fixture(scope="session")
def steps(run):
    """The programs that the runs of all methods share."""
    settings = run.config.train
    return make_steps(run.model, settings, planned_steps(settings, len(run.train)))


@pytest.fixture(scope="session")
def decoding(run):
    """The base in the layout for decoding."""
    return decode_layout(run.base)


@pytest.fixture(scope="session")
def theirs(folder):
    """The model in transformers, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_model(folder)


@pytest.fixture(scope="session")
def text():
    """English text of about 2,400 tokens that never changes."""
    return (ROOT / "LICENSE").read_text()
