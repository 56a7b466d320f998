"""Prompts, logits and texts of the published model are those of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.transformer import forward, unembed
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import read_records
from milora_jax.data.sources import Source
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.types import Batch
from tests.real.reference import rms, text_of, their_answer
from tests.storage.torch_logits import logits_of, their_logits

pytestmark = pytest.mark.real

PART = "logits and texts"
LENGTHS = (300, 700)
LONGEST = 2000
NEW = 24
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "  Two roads diverged in a yellow wood,",
    "Q: What is 17 + 25?\nA:",
    "人工智能是",
)


def ids_of(tokenizer, text, length):
    """Exactly so many tokens of a text."""
    ids = tokenizer(text)["input_ids"][:length]
    assert len(ids) == length
    return ids


def padded_logits(base, config, rows):
    """Logits of rows of several lengths in one batch, each without its padding."""
    width = max(map(len, rows))
    tokens = jnp.asarray([np.pad(row, (0, width - len(row))) for row in rows], jnp.int32)
    real = jnp.asarray([[i < len(row) for i in range(width)] for row in rows], jnp.int32)
    batch = Batch.unpadded(tokens).replace(segment_ids=real)

    def compute(base):
        output = forward(base, config, batch)
        return unembed(base, config, output.hidden)

    whole = np.asarray(jax.jit(compute)(base))
    return [logits[: len(row)] for logits, row in zip(whole, rows, strict=True)]


def test_float32_logits_are_those_of_transformers(run, theirs, text, record):
    """Of prompts of several lengths, in one batch and alone."""
    short = [ids_of(run.tokenizer, text[100 * i :], length) for i, length in enumerate(LENGTHS)]
    found = padded_logits(run.base, run.model, short)
    for ids, ours in zip(short, found, strict=True):
        error = np.abs(ours - their_logits(theirs, np.array([ids]))[0]).max()
        record(PART, f"{len(ids)} tokens in a padded batch: largest difference, float32", error, "< 5e-4")
        assert error < 5e-4
    whole = np.array([ids_of(run.tokenizer, text, LONGEST)], np.int32)
    ours, expected = logits_of(run.base, run.model, None, whole)[0], their_logits(theirs, whole)
    error, size = np.abs(ours - expected).max(), np.abs(expected).max()
    record(PART, f"{LONGEST:,} tokens: largest difference, float32", error, "< 5e-4")
    record(PART, f"{LONGEST:,} tokens: largest logit", size)
    assert error < 5e-4


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(folder, run, theirs, text, record):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = np.array([ids_of(run.tokenizer, text, max(LENGTHS))], np.int32)
    exact = their_logits(theirs, tokens)
    base, config = load_base(folder, "bfloat16")
    ours = rms(logits_of(base, config, None, tokens)[0].astype(np.float32) - exact)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        other = rms(half(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy() - exact)
    record(PART, "bfloat16 against float32, root mean square: transformers", other)
    record(PART, "bfloat16 against float32, root mean square: ours", ours, "not above transformers'")
    assert 0 < ours <= other


def test_training_prompts_are_tokenised_as_the_tokenizer_does(run):
    records = read_records(Source("rows", run.config.data.train))
    expected = {tuple(run.tokenizer(prompt_text(each))["input_ids"]) for each in records}
    for (example,) in [*run.train, *run.dev]:
        assert tuple(example.tokens[: example.prompt_length].tolist()) in expected


def test_greedy_texts_are_those_of_transformers(run, decoding, theirs, text, record):
    long = run.tokenizer.decode(ids_of(run.tokenizer, text, LENGTHS[1]))
    prompts = [*PROMPTS, long]
    answers = [
        answer
        for group in (PROMPTS, [long])
        for answer in generate(decoding, run.model, run.tokenizer, group, max_new_tokens=NEW)
    ]
    same = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = run.tokenizer(prompt)["input_ids"]
        expected = their_answer(theirs, run.tokenizer, ids, NEW)
        same += list(answer.tokens) == expected
        assert answer.text == text_of(run.tokenizer, expected), prompt
    record(PART, f"prompts whose greedy {NEW} tokens are the same", f"{same} of {len(prompts)}", "all")
    assert same == len(prompts)


@pytest.mark.slow
def test_beam_texts_are_those_of_transformers(run, decoding, theirs, record):
    settings = GenerationSettings(max_new_tokens=NEW, num_beams=3)
    answers = generate(decoding, run.model, run.tokenizer, PROMPTS, settings=settings)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = run.tokenizer(prompt)["input_ids"]
        expected = their_answer(theirs, run.tokenizer, ids, NEW, num_beams=3)
        assert answer.text == text_of(run.tokenizer, expected), prompt
    record(
        PART, "prompts whose texts of three beams are the same", f"{len(answers)} of {len(PROMPTS)}", "all"
    )
