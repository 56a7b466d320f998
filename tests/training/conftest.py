"""Inputs of real runs."""

import pytest

from tests.training.runs import write_inputs
from tests.training.short_runs import prepare_short_run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a small model directory and a training file."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A short run and its programs, of ``tests.training.short_runs``."""
    return prepare_short_run(tmp_path_factory.mktemp("inputs"))
