"""Beam search: exhaustive where it can be, equal to Hugging Face's, and without a copy of the cache."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from milora_jax.base.transformer import unembed
from milora_jax.data.batches import collate_prompts
from milora_jax.generation.beam import Terms, _start, beam_chunk, beam_search
from milora_jax.generation.decode import prefill
from milora_jax.generation.settings import GenerationSettings
from tests.adapted import BASE, make_adapter, row_batch, run, text
from tests.generation.decoding import DECODING, decoded, one_tenant
from tests.models import TINY, random_base, write_hf_directory
from tests.programs import compiled

SMALL_VOCAB = dataclasses.replace(TINY, vocab_size=5)


def search(adapter, prompts, config=TINY, base=DECODING, **settings):
    settings = GenerationSettings(**{"num_beams": 3, "max_new_tokens": 10, **settings})
    return beam_search(base, config, one_tenant(adapter), [list(map(int, p)) for p in prompts], settings)


def log_probability(adapter, prompt, tokens):
    batch = row_batch(np.array(prompt), np.array(tokens, np.int64), length=32)
    logits = unembed(BASE, TINY, run(adapter, batch).hidden[0])
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(tokens))


@pytest.mark.thorough
def test_one_beam_is_greedy():
    prompts = [text(i, 5 + i) for i in range(3)]
    for found, expected in zip(
        search(make_adapter(), prompts, num_beams=1), decoded(make_adapter(), prompts, 10), strict=True
    ):
        assert list(found.tokens) == expected


@pytest.mark.thorough
@pytest.mark.parametrize("method", [None, "milora", "moelora", "iapt"])
def test_the_score_is_that_of_the_tokens(method):
    """Ancestry, positions and masks are right: a full forward pass gives the same log-probability."""
    adapter = None if method is None else make_adapter(method=method)
    for found, prompt in zip(
        search(adapter, [text(2, 6), text(3, 9)], ignore_eos=True), (text(2, 6), text(3, 9)), strict=True
    ):
        assert len(found.tokens) == 10
        score = log_probability(adapter, prompt, found.tokens) / 10
        np.testing.assert_allclose(found.score, score, rtol=1e-4)


@pytest.mark.thorough
def test_a_beam_as_wide_as_everything_finds_the_best_of_all():
    from milora_jax.base.modules import decode_layout
    from milora_jax.generation.lengths import bucket_of

    assert bucket_of(3, 128) == 32
    base = decode_layout(random_base(SMALL_VOCAB))
    (found,) = search(
        None,
        [[1, 3, 4]],
        SMALL_VOCAB,
        base,
        num_beams=25,
        max_new_tokens=3,
        ignore_eos=True,
        length_penalty=0.0,
    )
    stacked = random_base(SMALL_VOCAB)
    scores = {}
    for tokens in itertools.product(range(5), repeat=3):
        batch = row_batch(np.array([1, 3, 4]), np.array(tokens))
        logits = unembed(stacked, TINY, run(None, batch, base=stacked).hidden[0])
        logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        scores[tokens] = sum(logprobs[2 + i, token] for i, token in enumerate(tokens))
    best = max(scores, key=scores.get)
    assert found.tokens == best
    np.testing.assert_allclose(found.score, scores[best], rtol=1e-5)


@pytest.mark.thorough
def test_prompts_do_not_see_each_other():
    prompts = [text(i, 4 + i) for i in range(3)]
    together = search(make_adapter(), prompts)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = search(make_adapter(), [prompt])
        assert found.tokens == alone.tokens
        np.testing.assert_allclose(found.score, alone.score, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("prompts", [1, 2])
def test_the_search_never_copies_a_cache(prompts):
    batch = collate_prompts([text(0, 6).tolist()] * prompts, 32, 0, rows=prompts)
    tenants = one_tenant(make_adapter())
    made, _ = prefill(DECODING, tenants, np.int32(0), batch, TINY, 32)
    terms = Terms(3, 24, (2,), 1.0, False)
    lowered = beam_chunk.lower(DECODING, tenants, np.int32(0), _start(made, terms), TINY, 16, terms)
    program = compiled(lowered).as_text()
    assert " conditional(" not in program
    moved = [shape for shape, _ in re.findall(r"= f32\[([\d,]+)\]\S* (copy|transpose|gather)\(", program)]
    shapes = [
        f"{leading},{slots},8" for leading in ("2", f"{prompts},2", f"{2 * prompts}") for slots in (32, 69)
    ]
    caches = {*shapes, f"{prompts},2,3,23,8", "2,3,23,8"}
    assert not caches & set(moved)


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 5, "length_penalty": 2.0},
        {"length_penalty": 0.0, "early_stopping": True},
        {"num_beams": 4, "length_penalty": -1.0},
        {"early_stopping": True, "max_new_tokens": 24},
        {"ends": 1, "length_penalty": -1.0},
    ],
)
def test_beams_equal_hugging_face(settings, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(TINY, vocab_size=23)
    write_hf_directory(tmp_path, config, tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    from milora_jax.base.load import load_base
    from milora_jax.base.modules import decode_layout

    base = decode_layout(load_base(tmp_path)[0])
    settings = {"num_beams": 3, "max_new_tokens": 12, **settings}
    ends = list(range(2, 2 + settings.pop("ends", 3)))
    stopped = 0
    for seed in range(12):
        prompt = np.random.default_rng(seed).integers(5, 23, 4 + seed % 5).tolist()
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                **settings,
            )
        (found,) = search(None, [prompt], config, base, stop_token_ids=tuple(ends[1:]), **settings)
        tokens = expected.sequences[0, len(prompt) :].tolist()
        assert list(found.tokens) == tokens[: len(found.tokens)]
        assert all(token == 0 for token in tokens[len(found.tokens) :])
        np.testing.assert_allclose(found.score, float(expected.sequences_scores[0]), rtol=1e-4)
        stopped += found.finish == "stop"
    assert stopped > 0, "no continuation ended by itself: nothing was tested"
