"""An engine whose layers are divided over devices: the same tokens, and no program is compiled late."""

import functools

import jax
import numpy as np
import pytest

from milora_jax.base.hf import load_leaves
from milora_jax.base.hf_config import read_model_config
from milora_jax.base.load import load_base
from milora_jax.base.modules import unroll
from milora_jax.config import MeshSection
from milora_jax.errors import UserError
from milora_jax.parallel.mesh import make_mesh
from milora_jax.parallel.rules import base_sharding
from milora_jax.serving.build import Offer, build_service
from milora_jax.serving.limits import Limits
from milora_jax.serving.metrics import COMPILATIONS, Metrics
from milora_jax.serving.registry import Registered, Registry
from tests.serving.harness import Listener, random_request, running, write_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensor")


@pytest.fixture(scope="module")
def adapters(folder):
    return write_model(folder)


LIMITS = Limits(rows=3, context=80, chunk=4, adapters_on_device=2, samples=1)


def service_over(folder, adapters, devices):
    registry = Registry(None, {name: Registered(path) for name, path in adapters.items()})
    return build_service(Offer(str(folder / "model"), "base", tensor=devices), registry, LIMITS)


def answers(service, requests):
    listeners = [Listener(service, name, prompt, **more) for name, prompt, more in requests]
    return [listener.end() for listener in listeners]


def logprobs(answer):
    return [each.logprob for sample in answer[1] for each in sample]


@pytest.mark.thorough
def test_two_devices_say_what_one_says_and_compile_nothing_late(folder, adapters):
    rng = np.random.default_rng(3)
    requests = [(*each, {**more, "num_samples": 1}) for *each, more in map(random_request, [rng] * 16)]
    with running(service_over(folder, adapters, 1)) as alone:
        expected = answers(alone, requests)
    service = service_over(folder, adapters, 2)
    kernel = service.engine._base.layers[0].up.kernel.get_value()
    assert kernel.addressable_shards[0].data.shape[1] * 2 == kernel.shape[1]
    metrics = Metrics()
    COMPILATIONS.add(metrics.compiled)
    try:
        with running(service):
            found = answers(service, requests)
            assert answers(service, requests) == found, "and the same again, bit for bit"
    finally:
        COMPILATIONS.remove(metrics.compiled)
    assert b"milora_compiled_programs_total 0.0" in metrics.text()
    cache = service.engine._batch.state.cache.layers[0].k
    assert cache.addressable_shards[0].data.shape[1] * 2 == cache.shape[1], "heads are divided"
    for (tokens, logprobs, finish), (its_tokens, its_logprobs, its_finish) in zip(
        expected, found, strict=True
    ):
        assert tokens == its_tokens
        assert finish == its_finish
        ours = [each.logprob for sample in logprobs for each in sample]
        np.testing.assert_allclose([e.logprob for s in its_logprobs for e in s], ours, rtol=0, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_base_is_read_apart_as_it_is_unrolled(folder, adapters, quantize):
    mesh = make_mesh(MeshSection(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    model = folder / "model"
    places = functools.partial(base_sharding, mesh)
    read = load_leaves(model, read_model_config(model), "float32", places, decode=True, quantize=quantize)
    made = unroll(load_base(folder / "model", quantize=quantize)[0])
    assert jax.tree.structure(read) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, read, made)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("devices", "message"), [(0, "tensor is 0"), (9, "tensor is 9"), (8, "num_heads is 4")]
)
def test_what_cannot_be_divided_is_refused(folder, adapters, devices, message):
    with pytest.raises(UserError, match=message):
        service_over(folder, adapters, devices)
