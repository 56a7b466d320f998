"""Log-likelihoods of passages: those of single unpadded texts under the route of the prompt alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.transformer import adapter_decode_layout, forward, unembed
from milora_jax.errors import UserError
from milora_jax.evaluation.likelihood import Passage, log_likelihoods, rolling_passages, score
from milora_jax.types import Batch
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.storage.adapters import noisy_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    # A token more of the prompt moves the answer of fewer layers hardly more than rounding does.
    write_hf_directory(path, dataclasses.replace(WITH_TOKENIZER, num_layers=4), tokenizer=False)
    return path


def drawn(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(4, WITH_TOKENIZER.vocab_size, length).tolist())


def adapter_of(base, config, method):
    """With a router whose every probability matters."""
    if method is None:
        return None
    return noisy_adapter(base, config, method, **({"gate": "softmax"} if method.startswith("mi") else {}))


def alone(folder, method, passage):
    """The same by one forward pass over nothing else, all logits kept.

    Where there is a router, it is not in that pass: the route is that of a pass over the prompt alone.
    """
    base, config = load_base(folder)
    adapter = adapter_of(base, config, method)

    def run(tokens, route=None, prompt=None):
        return computed(jnp.asarray(tokens, jnp.int32)[None], route, prompt)

    @functools.partial(jax.jit, static_argnames="prompt")
    def computed(tokens, route, prompt):
        batch = Batch.unpadded(tokens)
        batch = batch if prompt is None else batch.replace(prompt_mask=batch.positions < prompt)
        return forward(base, config, batch, adapter=adapter, route=route)

    shown, scored = passage.tokens[:-1], passage.scored
    if adapter is not None and adapter.method.routes:
        route = run(passage.tokens[: passage.prompt], prompt=passage.prompt).route
        hidden = run(shown, route.weights).hidden
    else:
        hidden = run(shown, prompt=passage.prompt).hidden
    logits = np.asarray(unembed(base, config, hidden), np.float64)[0, -scored:]
    targets = np.array(passage.tokens[-scored:])
    normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (logits[np.arange(scored), targets] - normaliser).sum(), (logits.argmax(-1) == targets).all()


def scored(folder, method, passages, rows):
    base, config = load_base(folder, decode=True)
    adapter = adapter_of(load_base(folder)[0], config, method)
    adapter = None if adapter is None else adapter_decode_layout(adapter, base)
    found = {}
    for results in log_likelihoods(base, config, adapter, passages, rows):
        found.update(results)
    return [found[i] for i in range(len(passages))]


PASSAGES = [Passage(drawn(40, 4), 6, 10), Passage(drawn(9), 5, 4), Passage(drawn(40, 3), 39, 1)]
ROWS = 64  # so many that the logits come in several chunks


OTHERS = (None, "midora", "moelora", "iapt", "p_tuning_v2")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "method", ["milora", *(pytest.param(name, marks=pytest.mark.thorough) for name in OTHERS)]
)
def test_they_are_those_of_single_unpadded_texts(folder, method):
    found = scored(folder, method, PASSAGES, ROWS)
    for passage, result in zip(PASSAGES, found, strict=True):
        expected, greedy = alone(folder, method, passage)
        assert abs(result.log_probability - expected) <= 2e-5 * passage.scored + 1e-4
        assert result.greedy == greedy


@pytest.mark.thorough
def test_what_is_scored_is_no_part_of_the_prompt(folder):
    """By the chain rule: a router that read on would give the later token another route."""
    tokens = drawn(12)
    whole, first, second, other = scored(
        folder,
        "milora",
        [Passage(tokens, 10, 2), Passage(tokens[:-1], 10, 1), Passage(tokens, 10, 1), Passage(tokens, 11, 1)],
        rows=ROWS,
    )
    assert abs(whole.log_probability - first.log_probability - second.log_probability) <= 1e-4
    assert abs(second.log_probability - other.log_probability) > 1e-2, "the prompt makes no difference"


@pytest.mark.thorough
def test_every_next_token_has_its_share(folder):
    context = drawn(7)
    found = scored(folder, "milora", [Passage((*context, v), 7, 1) for v in range(320)], ROWS)
    shares = np.exp([result.log_probability for result in found])
    assert abs(shares.sum() - 1) <= 1e-4
    assert [result.greedy for result in found] == [i == shares.argmax() for i in range(320)]


@pytest.mark.thorough
def test_one_program_for_each_length(folder):
    lengths = (3, 20, 33, 34, 60, 7, 33)
    passages = [Passage(drawn(length, length), 1, 1) for length in lengths]
    before = score._cache_size()
    first = scored(folder, None, passages, rows=2)
    assert score._cache_size() == before + 2, "32 and 64 tokens"
    assert scored(folder, None, passages[::-1], rows=2) == first[::-1]
    assert score._cache_size() == before + 2


@pytest.mark.parametrize("led", [False, True])
@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 11, 12, 13, 31])
def test_windows_predict_every_token_once(length, led):
    tokens, width = list(range(10, 10 + length)), 6
    windows = rolling_passages(tokens, 1, width, led)
    predicted = [token for window in windows for token in window.tokens[-window.scored :]]
    assert predicted == tokens
    for number, window in enumerate(windows):
        assert len(window.tokens) <= width + 1
        assert (window.tokens[0] == 1) == (led or number == 0)
        if led or number == 0:
            assert window.prompt == 1


def test_a_passage_has_a_prompt_and_something_to_score():
    for tokens, prompt, count in [((1,), 1, 1), ((1, 2), 0, 1), ((1, 2), 1, 2), ((1, 2, 3), 1, 0)]:
        with pytest.raises(UserError, match=r"^(prompt|scored) is "):
            Passage(tokens, prompt, count)
