"""Tensor files that are whole, and ones that lie about what they hold."""

import json
import pickle

import numpy as np

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
