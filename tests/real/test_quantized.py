"""The published model kept in eight and in four bits: what torch makes of the rounded weights, trained on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from milora_jax.adapters.registry import build_method
from milora_jax.base.load import load_base
from milora_jax.base.modules import decode_layout
from milora_jax.config import AdapterSection, ModelSection
from milora_jax.generation.text import generate
from milora_jax.storage.adapters import best_metadata, load_adapter
from tests.real.reference import rounded, their_perplexity
from tests.storage.torch_logits import logits_of
from tests.training.short_runs import fit

pytestmark = pytest.mark.real

PART = "quantised bases"
WORSE = {"int8": 1.05, "nf4": 1.5}
"""Most that a perplexity may grow by, as a factor. NF4 costs so small a model much, in torch as here."""

LENGTH = 512


def perplexity(base, config, ids):
    """Of a text's tokens after the first."""
    tokens = np.array([ids], np.int32)
    logits = logits_of(base, config, None, tokens)[0][0, :-1]
    losses = np.asarray(jax.nn.logsumexp(logits, axis=-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    return float(np.exp(losses.mean()))


@pytest.fixture(scope="module")
def ids(run, text):
    """Of a part of the text."""
    return run.tokenizer(text)["input_ids"][:LENGTH]


@pytest.mark.parametrize("scheme", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_base_is_torchs_and_learns(scheme, folder, run, theirs, ids, tmp_path, record):
    base, config = load_base(folder, quantize=scheme)
    found, plain = perplexity(base, config, ids), their_perplexity(theirs, ids)
    with rounded(theirs, scheme):
        expected = their_perplexity(theirs, ids)
    record(PART, f"perplexity of {LENGTH} tokens in float32", plain)
    record(PART, f"{scheme}: perplexity over that in float32", found / plain, f"< {WORSE[scheme]}")
    record(PART, f"{scheme}: difference from torch, relative", abs(found / expected - 1), "< 1e-4")
    assert 0.9 < found / plain < WORSE[scheme]
    assert abs(found / expected - 1) < 1e-4
    settings = dataclasses.replace(
        run.config,
        model=ModelSection(str(folder), quantize=scheme),
        adapter=AdapterSection(method="milora", rank=4),
    )
    mine = dataclasses.replace(run, base=base, config=settings)
    fit(mine, None, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["cross_entropy"] for line in lines if "loss" in line]
    record(PART, f"{scheme}: losses of the first and the last step", f"{losses[0]:.3f}, {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    assert best_metadata(tmp_path)["quantize"] == scheme
    adapter = load_adapter(tmp_path)
    assert adapter.method == build_method(settings.adapter)
    prompts = ["The capital of France is"]
    (answer,) = generate(
        decode_layout(base), config, run.tokenizer, prompts, adapter=adapter, max_new_tokens=8
    )
    assert answer.samples[0].finish in ("stop", "length")
    assert answer.route is not None
