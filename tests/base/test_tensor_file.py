"""A base's safetensors files, hostile ones included: whole tensors, slices, threads, and one clear line."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from milora_jax.base import hf, leaf_reading
from milora_jax.base.byte_files import LocalFile
from milora_jax.base.load import load_base
from milora_jax.base.tensor_file import TensorFile
from milora_jax.errors import UserError
from tests.models import TINY, random_base, write_hf_directory
from tests.paths import ROOT
from tests.storage.hostile_files import HOSTILE, WHOLE

OF_ADAPTERS = {"integers", "not a number", "bfloat16 infinity"}
"""What only an adapter is refused for: a base may hold other dtypes, and its values are not looked at."""


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - OF_ADAPTERS))
def test_a_hostile_file_is_refused_by_name(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        TensorFile.of(LocalFile(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_directory_and_a_pipe_are_no_files_and_nobody_waits(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(UserError, match="not a regular file"):
            TensorFile.of(LocalFile(tmp_path / name))
    with pytest.raises(UserError, match="No such file"):
        TensorFile.of(LocalFile(tmp_path / "none"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_chunks_of_any_size_make_the_tensor(dtype, tmp_path, monkeypatch):
    values = np.arange(35, dtype=np.float32).reshape(7, 5).astype(jnp.dtype(dtype))
    save_file({"a": values[:1], "t": values}, tmp_path / "x")
    file = TensorFile.of(LocalFile(tmp_path / "x"))
    for size in (1, values.nbytes // 3, 2**20):
        monkeypatch.setattr(LocalFile, "block", size)
        np.testing.assert_array_equal(file.whole("t"), values)
        rows = [(start, chunk.copy()) for start, chunk in file.chunks("t", 2, 6)]
        np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in rows]), values[2:6])
        assert rows[0][0] == 2


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(WHOLE)
    file = TensorFile.of(LocalFile(path))
    path.write_bytes(WHOLE[:-4])
    with pytest.raises(UserError, match=r"ends at byte [0-9]+, where there were more"):
        file.whole("b")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 4), (4, 3), (35, 6), (36, 7), (64, 34)])
def test_rows_become_columns(dtype, shape):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 7.5
    values = values.astype(jnp.dtype(dtype))
    for rows in (values, np.repeat(values, 2, axis=1)[:, ::2]):
        for offset in (0, 1):
            around = np.zeros((shape[1], shape[0] + 3), values.dtype)
            leaf_reading._copy_transposed(rows, around[:, offset : offset + shape[0]])
            np.testing.assert_array_equal(around[:, offset : offset + shape[0]], values.T)
            assert not around[:, :offset].any()
            assert not around[:, offset + shape[0] :].any()


def test_tensors_in_many_pieces_by_many_threads_are_the_same(tmp_path, monkeypatch):
    write_hf_directory(tmp_path, TINY, tokenizer=False)
    monkeypatch.setattr(leaf_reading, "PIECE_BYTES", 64)
    monkeypatch.setattr(hf, "THREADS", 7)
    monkeypatch.setattr(leaf_reading, "THREADS", 7)
    monkeypatch.setattr(LocalFile, "block", 300)
    monkeypatch.setattr(leaf_reading, "TRANSPOSED_ROWS", 2)
    found, expected = load_base(tmp_path)[0], random_base(TINY)
    for one, other in zip(*map(_leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


def _leaves(base):
    import jax

    return jax.tree.leaves(base)


OPENS = """
import sys
from pathlib import Path

opened = []
sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
from milora_jax import load_base
opened.clear()
load_base(sys.argv[1])
print("\\n".join(sorted({path for path in opened if path.startswith(sys.argv[2])})))
"""


def test_nothing_outside_the_directory_is_opened(tmp_path):
    model = tmp_path / "model"
    write_hf_directory(model, TINY, tokenizer=False)
    (tmp_path / "outside").write_text("secret")
    done = subprocess.run(
        [sys.executable, "-c", OPENS, str(model), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = done.stdout.split()
    assert found == [str(model / "config.json"), str(model / "model.safetensors")]
