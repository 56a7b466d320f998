"""Routers of the embedded model on its real prompts: blind to them, or seeing, by what they read.

A router is blind where most prompts get one and the same route, whatever they ask.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.attention import attention
from milora_jax.base.load import load_base
from milora_jax.base.modules import frozen_kernels
from milora_jax.base.transformer import forward
from milora_jax.config import AdapterSection, Config, DataSection, ModelSection, TrainSection
from milora_jax.data.batches import collate
from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_records, load_tokenizer
from milora_jax.prompt_format import PromptFormat
from milora_jax.tiny import MODEL_DIR, TASKS, TASKS_DIR
from milora_jax.training.calibration import feature_program, feature_statistics
from milora_jax.training.health import PromptRoutes, routing_health
from milora_jax.training.loop import Trainer
from milora_jax.training.prepare import prepare_run
from tests.training.short_runs import on_one_device

MEASURED, ASKED, LENGTH = 40, 24, 160
SETTINGS = [("attention", "standardized"), ("mean", "standardized"), ("last", "standardized")]


@pytest.fixture(scope="module")
def tiny():
    """Base, its config, and encoded rows by task."""
    base, config = load_base(MODEL_DIR)
    tokenizer = load_tokenizer(str(MODEL_DIR))
    examples = {}
    for task in TASKS:
        records = read_records(Source(task, str(TASKS_DIR / task / "train.jsonl")))[: MEASURED + ASKED]
        examples[task], _ = encode_records(tokenizer, records, config, LENGTH, PromptFormat("alpaca", "bos"))
    return base, config, examples


def batch_of(examples):
    return jax.tree.map(jnp.asarray, collate([[e] for e in examples], LENGTH, len(examples)))


def fresh_health(tiny, **settings):
    """The health of a fresh router, its features measured on other prompts than are asked."""
    base, config, examples = tiny
    method = build_method(AdapterSection(rank=4, **settings))
    adapter = init_adapter(method, jax.random.key(1), adapter_shape(config), frozen_kernels(base))
    if (calibration := method.calibration) is not None:
        program = feature_program(config, calibration, attention)
        batches = (batch_of(rows[:MEASURED]) for rows in examples.values())
        found = feature_statistics(lambda batch: program(base, batch), batches, MEASURED * len(TASKS))
        measured = jnp.asarray(found.mean), jnp.asarray(found.deviation)
        params = calibration.store(adapter.params, *measured)
        adapter = dataclasses.replace(adapter, params=params)
    asked = [example for rows in examples.values() for example in rows[MEASURED:]]
    route = jax.jit(lambda a, b: forward(base, config, b, adapter=a).route)(adapter, batch_of(asked))
    seen = PromptRoutes.of(route)
    return routing_health(seen, None, [example.source for example in asked])


@pytest.mark.sweep("attention")
@pytest.mark.parametrize(("pooler", "features"), SETTINGS)
def test_fresh_routers_part_prompts_of_different_tasks(tiny, pooler, features):
    health = fresh_health(tiny, pooler=pooler, features=features)
    assert health.across.mean() < 0.35
    # Every prompt ends in the same token, of which the first layer sees the embedding alone.
    assert health.common[1 if pooler == "last" else 0 :].max() < 0.95
    assert health.largest.max() <= 3
    assert health.warning(AdapterSection(features=features)) is None


def test_the_same_test_tells_a_blind_router(tiny):
    """With today's features of the residual stream, or its mean alone: the template is nearly all of it."""
    health = fresh_health(tiny, pooler="mean", features="rms")
    assert health.across.mean() > 0.5
    assert "share one route" in health.warning(AdapterSection(features="rms"))


@pytest.mark.thorough
def test_trained_routers_still_part_prompts(tmp_path):
    files = {
        split: ",".join(f"{task}={TASKS_DIR / task / split}.jsonl" for task in TASKS)
        for split in ("train", "dev")
    }
    config = Config(
        model=ModelSection(path=str(MODEL_DIR)),
        adapter=AdapterSection(
            rank=16, features="standardized", feature_window=0.1, top_k_anneal=0.4, load_balance=0.0
        ),
        data=DataSection(**files, max_length=LENGTH, special_tokens="bos"),
        train=TrainSection(
            max_steps=60, batch_size=8, learning_rate=3e-3, coefficient_every=20, eval_every=30
        ),
    )
    run = on_one_device(prepare_run(config, None, print))
    Trainer(run, tmp_path, print).fit(lambda step, status: None, lambda: False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "route_across" in line][-1]
    assert np.mean(last["route_across"]) < 0.5
    assert max(last["pooler_share"]) < 0.9
