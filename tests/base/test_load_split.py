"""A base that is spread over devices: every device's slices, read once, and nothing beside them.

Devices that have a memory of their own get a leaf tensor by tensor; here those of the CPU stand in for them.
"""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from milora_jax import load_base
from milora_jax.base import hf, leaf_reading
from milora_jax.base.hf import load_leaves
from milora_jax.base.leaf_buffers import DeviceBuffer, HostBuffer, shape_of
from milora_jax.base.modules import decode_layout
from milora_jax.base.specs import base_specs
from milora_jax.config import QUANTIZE, MeshSection
from milora_jax.errors import UserError
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.rules import base_sharding
from tests.base import pieces
from tests.models import QUANTIZABLE, random_base, write_hf_directory

# The vocabulary and the heads must divide by the tensor axis.
PLAIN = dataclasses.replace(pieces.PLAIN, vocab_size=60, num_heads=4, num_kv_heads=4)
GROUPED = dataclasses.replace(pieces.GROUPED, vocab_size=60)


def split(folder, config, *, data=1, fsdp=1, tensor=1, dtype="float32", quantize="none"):
    mesh = make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])
    return load_leaves(folder, config, dtype, lambda path: base_sharding(mesh, path), quantize=quantize)


@pytest.fixture(params=[HostBuffer, DeviceBuffer])
def buffer(request, monkeypatch):
    """Leaves are put together in buffers of this kind."""
    monkeypatch.setattr(hf, "buffer_for", request.param)
    return request.param


@pytest.mark.thorough
@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("config", [PLAIN, GROUPED])
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2}, {"data": 4}]
)
def test_a_split_base_is_the_whole_one(tmp_path, config, sizes):
    write_hf_directory(tmp_path, config, tokenizer=False)
    base = split(tmp_path, config, **sizes)
    jax.tree.map(np.testing.assert_array_equal, base, random_base(config))
    kernel = base.layers.q.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (
        kernel.shape[0],
        kernel.shape[1] // sizes.get("fsdp", 1),
        kernel.shape[2] // sizes.get("tensor", 1),
    )


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_every_slice_is_read_once_and_only_the_devices_own(tmp_path, monkeypatch, quantize):
    config = PLAIN if quantize == "none" else QUANTIZABLE
    write_hf_directory(tmp_path, config, tokenizer=False)
    read, copy = [], leaf_reading.read_slices
    monkeypatch.setattr(
        leaf_reading, "read_slices", lambda place, *rest: (read.append(place.size), copy(place, *rest))
    )
    whole = sum(np.prod(spec.shape) for spec in jax.tree.leaves(base_specs(config)))
    for sizes in ({}, {"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        read.clear()
        split(tmp_path, config, **sizes, quantize=quantize)
        assert sum(read) == whole, sizes


@pytest.mark.thorough
@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_split_quantised_base_is_the_whole_one(tmp_path, quantize):
    write_hf_directory(tmp_path, QUANTIZABLE, tokenizer=False)
    base = split(tmp_path, QUANTIZABLE, data=2, fsdp=2, tensor=2, quantize=quantize)
    expected, _ = load_base(tmp_path, quantize=quantize)
    jax.tree.map(np.testing.assert_array_equal, base, expected)


@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("decode", [False, True])
def test_progress_ends_at_the_size_of_the_base(tmp_path, decode):
    write_hf_directory(tmp_path, PLAIN, tokenizer=False)
    steps = []
    base, _ = load_base(tmp_path, decode=decode, progress=lambda *step: steps.append(step))
    jax.tree.map(np.testing.assert_array_equal, base, _laid_out(random_base(PLAIN), decode))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    assert steps[-1] == (size, size)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps}), "never backwards, nor twice"
    assert len(steps) >= PLAIN.num_layers * 9


def _laid_out(base, decode):
    return decode_layout(base) if decode else base


def test_a_host_holds_no_more_than_a_tensor_per_thread_for_devices(tmp_path, monkeypatch):
    held, most, lock = {}, [], threading.Lock()

    class Counted(DeviceBuffer):
        def region(self, box):
            region = super().region(box)
            with lock:
                held[id(region)] = region.nbytes
                most.append((len(held), sum(held.values())))
            return region

        def put(self, box, values):
            super().put(box, values)
            with lock:
                del held[id(values)]

    write_hf_directory(tmp_path, PLAIN, tokenizer=False)
    monkeypatch.setattr(hf, "buffer_for", Counted)
    base = split(tmp_path, PLAIN, fsdp=2)
    jax.tree.map(np.testing.assert_array_equal, base, random_base(PLAIN))
    largest = max(
        np.prod(spec.tensor_shape(part)) for spec in jax.tree.leaves(base_specs(PLAIN)) for part in spec.parts
    )
    assert not held
    assert max(count for count, _ in most) <= leaf_reading.THREADS
    assert max(size for _, size in most) <= leaf_reading.THREADS * largest * 4


@pytest.mark.thorough
@pytest.mark.usefixtures("buffer")
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_slices_of_any_dtype(tmp_path, stored):
    write_hf_directory(tmp_path, PLAIN, dtype=stored, tokenizer=False)
    base = split(tmp_path, PLAIN, fsdp=4, tensor=2, dtype="bfloat16")
    expected, _ = load_base(tmp_path, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, base, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {np.dtype("bfloat16")}


def test_a_tensor_of_integers_or_of_another_shape_is_refused_by_name(tmp_path):
    from safetensors.numpy import load_file, save_file

    write_hf_directory(tmp_path, PLAIN, tokenizer=False)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    for wrong, message in (
        (tensors[name].astype(np.int32), "has dtype I32, expected a floating type"),
        (tensors[name].T, "has shape .*, expected"),
    ):
        save_file({**tensors, name: np.ascontiguousarray(wrong)}, path)
        with pytest.raises(UserError, match=f"{name}' {message}"):
            split(tmp_path, PLAIN, fsdp=4)


def test_parts_of_a_joined_leaf_can_be_boxed(tmp_path, buffer):
    """Columns of a joined matrix that cross the edge between two modules come from both tensors."""
    write_hf_directory(tmp_path, GROUPED, tokenizer=False)
    files = hf.files_by_tensor(tmp_path)
    made = decode_layout(random_base(GROUPED))
    spec = base_specs(GROUPED, decode=True).layers[1].qkv.kernel.get_value()
    whole = np.asarray(made.layers[1].qkv.kernel[...])
    edge = GROUPED.module_dims["q"][1]
    for columns in (slice(edge - 3, edge + 2), slice(0, whole.shape[1]), slice(edge, edge + 1)):
        box = (slice(2, 9), columns)
        here = buffer(shape_of(box), np.dtype("float32"), jax.devices()[1:3])
        with ThreadPoolExecutor(2) as pool:
            leaf_reading.fill(spec, [(box, here)], files, {}, pool, lambda size: None)
        for device, found in zip(jax.devices()[1:3], here.arrays(), strict=True):
            np.testing.assert_array_equal(found, whole[box])
            assert found.devices() == {device}
