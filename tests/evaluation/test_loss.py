"""The loss on test rows: that of training on the same rows, and what is left out of it."""

import dataclasses
import functools
import json
import math

import jax
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.transformer import adapter_decode_layout
from milora_jax.data.batches import collate
from milora_jax.data.records import Record
from milora_jax.data.tokens import encode_example, load_tokenizer
from milora_jax.evaluation.likelihood import score
from milora_jax.evaluation.loss import Loss, encode_responses, response_loss
from milora_jax.evaluation.report import loss_notes
from milora_jax.evaluation.score import Prediction, TaskScore, figures, losses_in
from milora_jax.prompt_format import PromptFormat
from milora_jax.training.loss import summed_loss
from tests.data.chats import THINKING, chat_tokenizer
from tests.models import write_hf_directory
from tests.storage.adapters import noisy_adapter


def record(instruction, output, given=""):
    return Record(instruction, given, output, output.strip() or "7")


RECORDS = [
    record(f"{'add ' * (4 * i)}{i}", f"It is {'very ' * (i % 4)}{i}", given="it" * (i % 2)) for i in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_hf_directory(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def loss_of(folder, tokenizer, records, method=None, rows=4):
    base, config = load_base(folder, decode=True)
    adapter = None
    if method is not None:
        stored = noisy_adapter(load_base(folder)[0], config, method, gate="softmax")
        adapter = adapter_decode_layout(stored, base)
    advanced = []
    responses = encode_responses(tokenizer, records, config, PromptFormat())
    found = response_loss(base, config, adapter, responses, rows, advance=advanced.append)
    assert sum(advanced) == found.scored == len(responses.passages)
    return found


@pytest.mark.thorough
def test_it_is_the_loss_whose_exponential_is_the_dev_perplexity(folder, tokenizer):
    """Computed by the other path: training's rows, masks and layout, padded to one length."""
    base, config = load_base(folder)
    adapter = noisy_adapter(base, config, "milora", gate="softmax")
    examples = [encode_example(tokenizer, each, config.eos_ids, 512, PromptFormat()) for each in RECORDS]
    length = max(len(example.tokens) for example in examples) + 3
    batch = collate([[example] for example in examples], length, len(examples))
    run = jax.jit(functools.partial(summed_loss, config=config))
    summed, tokens, _ = run(adapter, base, batch=jax.device_put(batch))
    found = loss_of(folder, tokenizer, RECORDS, "milora")
    assert found.tokens == int(tokens)
    assert found.mean == pytest.approx(float(summed) / int(tokens), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.mean))
    plain = loss_of(folder, tokenizer, RECORDS)
    assert abs(plain.mean - found.mean) > 1e-2, "the adapter makes no difference"


@pytest.mark.thorough
def test_batches_and_other_rows_make_no_difference(folder, tokenizer):
    together = loss_of(folder, tokenizer, RECORDS)
    before = score._cache_size()
    alone = [loss_of(folder, tokenizer, [each]) for each in RECORDS]
    assert score._cache_size() == before, "rows of a length share a program"
    assert sum(each.tokens for each in alone) == together.tokens
    weighted = sum(each.mean * each.tokens for each in alone) / together.tokens
    assert together.mean == pytest.approx(weighted, rel=1e-6)


def test_rows_without_a_loss_are_counted_and_left_out(folder, tokenizer):
    """A row whose answer stands alone, and one that is longer than the model; neither is cut or guessed."""
    odd = [record("How many?", ""), record("How many?", "  "), record("Say it.", "very " * 600)]
    found = loss_of(folder, tokenizer, [odd[0], *RECORDS, *odd[1:]])
    expected = loss_of(folder, tokenizer, RECORDS)
    assert found == dataclasses.replace(expected, left_out={"no_output": 2, "too_long": 1})
    nothing = loss_of(folder, tokenizer, odd[:2])
    assert nothing == Loss(None, 0, 0, {"no_output": 2})
    assert nothing.perplexity is None


def test_the_longest_row_that_fits_is_scored(folder, tokenizer):
    config = load_base(folder)[1]
    fits = record("Say it.", "very")
    size = len(encode_example(tokenizer, fits, config.eos_ids, config.max_positions, PromptFormat()).tokens)
    for positions, left_out in ((size, {}), (size - 1, {"too_long": 1})):
        short = dataclasses.replace(config, max_positions=positions)
        assert encode_responses(tokenizer, [fits], short, PromptFormat()).left_out == left_out


def test_a_model_that_cannot_end_an_answer_has_no_loss(folder, tokenizer):
    endless = dataclasses.replace(load_base(folder)[1], eos_ids=())
    found = encode_responses(tokenizer, RECORDS, endless, PromptFormat())
    assert (found.passages, found.left_out) == ([], {"no_end_token": 5})


def scored(task, loss):
    answer = Prediction(task, 0, "ask", "1", "1", "number", "1", False, True, None)
    return TaskScore(task, [answer], loss)


def test_figures_are_json_and_losses_are_read_back_from_them():
    losses = {
        "all": Loss(0.5, 3, 7, {}),
        "some": Loss(1.5, 2, 5, {"no_output": 6, "too_long": 1}),
        "none": Loss(None, 0, 0, {"no_output": 3}),
        "bad": Loss(None, 4, 9, {}),
        "steep": Loss(1e4, 1, 1, {}),
    }
    found = figures([scored(task, loss) for task, loss in losses.items()])
    read = json.loads(json.dumps(found, allow_nan=False))
    assert losses_in(read) == losses
    assert read["loss"] == {"all": 0.5, "some": 1.5, "none": None, "bad": None, "steep": 1e4}
    assert read["perplexity"]["all"] == pytest.approx(math.exp(0.5))
    assert (read["perplexity"]["none"], read["measures"]) == (None, {})
    assert loss_notes(found) == [
        "note: some: 7 of 9 rows have no loss (no output: 6, more tokens than the model has positions: 1)",
        "note: none: 3 of 3 rows have no loss (no output: 3)",
        "note: bad: the loss is not finite",
    ]
    assert losses_in({"accuracy": {"all": 1.0}}) == {}
    assert figures([scored("alone", None)])["loss"] == {}


def test_an_output_that_stays_in_an_open_thought_is_left_out(folder, tmp_path):
    """It cannot be learned, and its question can be asked all the same."""
    rows = [record("2 + 2?", "4"), record("2 + 2?", "two two</think>4")]
    tokenizer = chat_tokenizer(tmp_path, THINKING)
    found = encode_responses(tokenizer, rows, load_base(folder)[1], PromptFormat("chat"))
    assert (len(found.passages), found.left_out) == (1, {"in_a_thought": 1})
