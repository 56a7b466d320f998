"""Start of a run with fixed routes: one random set of experts per layer, for all prompts alike.

It needs no method of its own. With W_r zero every expert of a MiLoRA has the probability 1/7, whatever the
prompt. ``balance="bias"`` adds a bias to the choice only; it is drawn here and, with ``bias_rate=0`` and
``train.router_rate=0``, never changes. The experts with the highest biases are the set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import frozen_kernels
from milora_jax.storage.adapters import adapter_metadata
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.training.prepare import Run

START = "start"
"""Folder of the adapter in the folder of the cell."""

FIXED: dict[str, Any] = {
    "balance": "bias",
    "bias_rate": 0.0,
    "gate": "straight_through",
    "coefficients": "frozen",
}
"""Settings of a MiLoRA whose set of experts is fixed."""


def with_fixed_mask(run: Run, directory: Path, log: Callable[[str], None]) -> Run:
    """A run that starts from an adapter with a random bias, which is written to ``directory``.

    Args:
      run: a run of a MiLoRA with the settings of :data:`FIXED`.
    """
    method, shape = build_method(run.config.adapter), adapter_shape(run.model)
    start_key, bias_key = jax.random.split(jax.random.key(run.config.train.seed))
    adapter = init_adapter(method, start_key, shape, frozen_kernels(run.base))
    router = adapter.params.router
    drawn = jax.random.normal(bias_key, router.bias.shape)
    router = dataclasses.replace(router, weight=jnp.zeros_like(router.weight), bias=drawn)
    params = dataclasses.replace(adapter.params, router=router)
    settings = run.config.model.quantize, run.config.prompt_format
    metadata = adapter_metadata(method, shape, run.base_fingerprint, *settings)
    steps = CheckpointDirectory(directory, 1, log)
    steps.save(0, params, metadata)
    steps.wait()
    train = dataclasses.replace(run.config.train, init_from=str(directory))
    return dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
