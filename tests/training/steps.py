"""Training steps of a small model on random rows."""

import dataclasses

import jax
import numpy as np

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import frozen_kernels
from milora_jax.config import AdapterSection, TrainSection
from milora_jax.training.step import init_state, make_steps
from tests.adapted import row_batch, stack, text
from tests.models import TINY, random_base, small

MODEL = dataclasses.replace(TINY, vocab_size=96)


SETTINGS = TrainSection(learning_rate=1e-2, coefficient_learning_rate=1e-2, warmup_share=0.1)


TOTAL = 20


def rows(seed=0, count=8):
    return stack(
        *(row_batch(text(seed + i, 4 + i % 3), text(50 + i, 6 - i % 3), length=12) for i in range(count))
    )


def prepare(total=TOTAL, settings=SETTINGS, **adapter_settings):
    method = build_method(AdapterSection(**{**small(adapter_settings), **adapter_settings}))
    kernels = frozen_kernels(random_base(MODEL))
    adapter = init_adapter(method, jax.random.key(0), adapter_shape(MODEL), kernels)
    return init_state(adapter, jax.random.key(1), settings, total), make_steps(MODEL, settings, total)


def params_of(state):
    return jax.tree.map(np.asarray, state.adapter.params)
