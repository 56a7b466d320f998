"""A safetensors file is read whole or refused by name."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from milora_jax.errors import UserError
from milora_jax.storage.adapter_tensors import parse_tensors, read_tensors, write_tensors
from tests.storage.hostile_files import HOSTILE, TENSORS, WHOLE


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(name):
    content, message = HOSTILE[name]
    with pytest.raises(UserError) as caught:
        parse_tensors(content, "x.safetensors")
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.safetensors: ")
    assert len(str(caught.value)) < 300


def test_every_dtype_of_an_adapter_is_read(tmp_path):
    values = {
        name: np.arange(4).astype(jnp.dtype(name)) for name in ("float64", "float32", "float16", "bfloat16")
    }
    (tmp_path / "x").write_bytes(save(values, metadata={"format": "pt"}))
    found = read_tensors(tmp_path / "x")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_what_is_written_is_read_and_equal_tensors_are_equal_bytes(tmp_path):
    write_tensors(tmp_path / "one", TENSORS)
    write_tensors(tmp_path / "two", dict(reversed(TENSORS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_tensors(tmp_path / "one")
    np.testing.assert_array_equal(found["a"], TENSORS["a"])
    write_tensors(tmp_path / "view", {"t": TENSORS["a"].T})
    np.testing.assert_array_equal(read_tensors(tmp_path / "view")["t"], TENSORS["a"].T)


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "real").write_bytes(WHOLE)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    for name, reason in {
        "link": "a symbolic link, expected a regular file",
        "fifo": "not a regular file",
        "none": "no such file or directory",
        ".": "not a regular file",
    }.items():
        with pytest.raises(UserError, match=reason):
            read_tensors(tmp_path / name)
