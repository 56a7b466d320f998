"""Inputs of real runs."""

import pytest

from tests.training.runs import write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a small model directory and a training file."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder
