"""A safetensors file is read whole or refused by name."""

import json
import os
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from milora_jax.errors import UserError
from milora_jax.storage.adapter_tensors import parse_tensors, read_tensors, write_tensors

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
DATA = b"".join(TENSORS[name].tobytes() for name in sorted(TENSORS))


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A, B = entry([2, 3], 0, 24), entry([2], 24, 32)


def file(header, data=DATA):
    """A file with a header given as text or as values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


WHOLE = file({"a": A, "b": B})
NOT_FINITE = np.array([np.nan, 1.0], np.float32).tobytes()
HOSTILE = {
    "empty": (b"", "not a whole safetensors file: its header has 0 bytes"),
    "truncated in the header": (WHOLE[:20], "not a whole safetensors file"),
    "truncated in the data": (WHOLE[:-1], "truncated: tensor 'b' ends at 32 of 31 bytes"),
    "trailing byte": (WHOLE + b"\0", "1 trailing bytes after the last tensor"),
    "no tensors but data": (file({}), "32 trailing bytes"),
    "header beyond the file": (
        (2**63).to_bytes(8, "little") + WHOLE[8:],
        "its header has 9223372036854775808",
    ),
    "header of 100 MB and a byte": ((100_000_001).to_bytes(8, "little") + WHOLE[8:], "100000001 bytes"),
    "pickle": (pickle.dumps(TENSORS), "not a whole safetensors file"),
    "header is no object": (file(b"[]"), "header: expected a JSON object, found list"),
    "header is not JSON": (file(b"{nope}"), "header: not readable JSON"),
    "header is not UTF-8": (file(b'{"\xff": 1}'), "header: not readable JSON"),
    "header is nested without end": (file(b"[" * 100_000), "header: not readable JSON"),
    "duplicate name": (
        file(f'{{"a": {json.dumps(A)}, "b": {json.dumps(B)}, "a": {json.dumps(A)}}}'.encode()),
        "the name 'a' occurs twice",
    ),
    "duplicate field": (file(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "the name 'dtype' occurs twice"),
    "overlap": (file({"a": A, "b": entry([2], 20, 28)}), "'a' and 'b' overlap: 24 and 20"),
    "gap": (file({"a": A, "b": entry([2], 28, 36)}, DATA + b"0000"), "'a' and 'b' leave a gap: 24 and 28"),
    "gap before": (file({"a": entry([2, 3], 8, 32)}), "8 bytes before the first tensor 'a'"),
    "shape of other size": (
        file({"a": entry([2, 4], 0, 24), "b": B}),
        "shape [2, 4] has 24 bytes, expected 32",
    ),
    "giant shape": (file({"a": entry([2**40, 2**40], 0, 24), "b": B}), "has 24 bytes, expected"),
    "zero-size giant shape": (
        file({"a": entry([0, 2**40], 0, 0)}, b""),
        "shape [0, 1099511627776], expected no",
    ),
    "negative size": (file({"a": entry([-2, -3], 0, 24), "b": B}), "shape [-2, -3], expected whole numbers"),
    "size is no number": (file({"a": entry([2.0, 3], 0, 24), "b": B}), "expected whole numbers"),
    "size is true": (file({"a": entry([True], 0, 4)}), "shape [True], expected whole numbers"),
    "too many axes": (file({"a": entry([1] * 9, 0, 4)}), "shape is no list of at most 8 numbers"),
    "offsets backwards": (file({"a": entry([2, 3], 24, 0)}), "data_offsets [24, 0]"),
    "one offset": (file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "data_offsets [0]"),
    "no dtype": (
        file({"a": {"shape": [1], "data_offsets": [0, 4]}}),
        "expected dtype, shape and data_offsets",
    ),
    "unknown dtype": (file({"a": entry([6], 0, 24, "F33"), "b": B}), "dtype 'F33', expected one of F64, F32"),
    "integers": (file({"a": entry([6], 0, 24, "I32"), "b": B}), "dtype 'I32', expected one of"),
    "dtype is a list": (file({"a": entry([6], 0, 24, ["F32"]), "b": B}), "dtype ['F32'], expected one of"),
    "entry is a number": (file({"a": 3}), "expected dtype, shape and data_offsets"),
    "endless name": (file({"a" * 10_000: A, "b": B}), "name has 10000 characters, expected at most 256"),
    "not a number": (file({"b": entry([2], 0, 8)}, NOT_FINITE), "'b' holds values that are not finite"),
    "bfloat16 infinity": (
        file({"b": entry([1], 0, 2, "BF16")}, b"\x80\x7f"),
        "'b' holds values that are not",
    ),
}


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
