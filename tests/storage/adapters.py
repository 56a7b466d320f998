"""Adapters in which every leaf matters, and runs that seem to have trained them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import ROUTERS_BEFORE_FEATURES, adapter_shape, build_method
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.load import load_base
from milora_jax.base.modules import frozen_kernels
from milora_jax.base.transformer import forward
from milora_jax.config import AdapterSection, Config, ModelSection
from milora_jax.storage.adapters import adapter_metadata
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.storage.files import json_bytes
from milora_jax.types import Batch
from tests.models import SMALL

STEP = 7


def noisy_adapter(base, config, method="milora", seed=0, **settings):
    """An adapter with random leaves of ordinary size."""
    built = build_method(AdapterSection(method=method, **{**SMALL[method], **settings}))
    fresh = init_adapter(built, jax.random.key(seed), adapter_shape(config), frozen_kernels(base))
    rng = np.random.default_rng(seed)

    def noise(path, leaf):
        ratio = 1 + 0.2 * rng.normal(size=leaf.shape) if "magnitude" in str(path) else 1.0
        plain = 0.0 if "magnitude" in str(path) else 0.2 * rng.normal(size=leaf.shape)
        return jnp.asarray((np.asarray(leaf) * ratio + plain).astype(np.float32))

    return dataclasses.replace(fresh, params=jax.tree_util.tree_map_with_path(noise, fresh.params))


def write_run(workdir, model, adapter):
    """What of a workdir an export reads: its config and its best adapter."""
    directory = CheckpointDirectory(workdir / "best", 1, print)
    metadata = adapter_metadata(
        adapter.method, adapter.shape, base_fingerprint(model), "none", adapter.prompt_format
    )
    directory.save(STEP, adapter.params, {**metadata, "dev_perplexity": 2.0})
    directory.wait()
    config = Config(model=ModelSection(path=str(model)))
    (workdir / "config.json").write_bytes(json_bytes(config.to_dict()))


def run_of(folder, model, method, **settings):
    """A workdir below ``folder`` with a random adapter of a method for a model directory, and the adapter."""
    base, config = load_base(model)
    adapter = noisy_adapter(base, config, method, **settings)
    write_run(folder, model, adapter)
    return adapter


def assert_equal(found, expected):
    """Bit for bit the same adapter."""
    assert (found.method, found.shape) == (expected.method, expected.shape)
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def hidden(folder, adapter=None, weights=None):
    """The final stream of a few tokens through a model directory, under a route where there are weights."""
    base, config = load_base(folder)
    tokens = jnp.asarray(np.random.default_rng(1).integers(4, config.vocab_size, (2, 9)), jnp.int32)
    route = None
    if weights is not None:
        route = jnp.broadcast_to(jnp.asarray(weights)[:, None, None], (config.num_layers, 2, 1, 7))

    def compute(base, adapter, route):
        return forward(base, config, Batch.unpadded(tokens), adapter=adapter, route=route).hidden

    return np.asarray(jax.jit(compute)(base, adapter, route))


def flip(path):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def of_then(values, normalize):
    """Stored settings as a version wrote them that had ``normalize``."""
    later = {*ROUTERS_BEFORE_FEATURES, "features", "route_on", "use_rslora", "target_modules"}
    return {**{name: value for name, value in values.items() if name not in later}, "normalize": normalize}
