"""A small random model with adapters, rows for it, and its forward pass."""

import jax
import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import frozen_kernels
from milora_jax.base.transformer import forward
from milora_jax.config import AdapterSection
from milora_jax.types import Batch
from tests.models import TINY, random_base, small

BASE = random_base(TINY)
PROMPT, ANSWER = 7, 5


def make_adapter(seed=0, change=True, **settings):
    """A fresh adapter; with ``change`` its B matrices and its pooler are random, as after training."""
    method = build_method(AdapterSection(**{**small(settings), **settings}))
    adapter = init_adapter(method, jax.random.key(seed), adapter_shape(TINY), frozen_kernels(BASE))
    if not change:
        return adapter
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return adapter.replace(params=jax.tree.unflatten(structure, noisy))


def row_batch(prompt, answer, length=None, left=False):
    """One record as a batch of one row, padded to ``length`` on either side."""
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    length = length or len(tokens)
    pad = length - len(tokens)
    widths = (pad, 0) if left else (0, pad)
    here = np.pad(np.ones(len(tokens), np.int32), widths)
    places = np.pad(np.arange(len(tokens), dtype=np.int32), widths)
    is_prompt = np.pad(np.arange(len(tokens)) < len(prompt), widths)
    return Batch(
        tokens=jnp.asarray(np.pad(tokens, widths, constant_values=1))[None],
        segment_ids=jnp.asarray(here)[None],
        positions=jnp.asarray(places)[None],
        prompt_mask=jnp.asarray(is_prompt)[None],
        loss_mask=jnp.asarray((here > 0) & ~is_prompt)[None],
    )


@jax.jit
def forward_program(base, batch, adapter, more):
    return forward(base, TINY, batch, adapter=adapter, **more)


def run(adapter, batch, base=BASE, **more):
    return forward_program(base, batch, adapter, more)


def stack(*batches):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def text(seed, length):
    return np.random.default_rng(seed).integers(3, TINY.vocab_size, length)
