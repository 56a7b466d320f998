"""Tokens and batches: order as a pure function, nothing cut, masks where they belong."""

import dataclasses
import json

import numpy as np
import pytest

from milora_jax.data.batches import batch_rows, collate, collate_prompts, padded_length
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record
from milora_jax.data.tokens import Example, encode_example, encode_prompt, encode_records, load_tokenizer
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat
from tests.models import WITH_TOKENIZER, write_tokenizer

EOS = 2
MODEL = dataclasses.replace(WITH_TOKENIZER, eos_ids=(EOS,))
BOS = PromptFormat(special_tokens="bos")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (10, 10), (3, 8), (7, 1)])
def test_every_epoch_takes_every_row_once(rows, size):
    steps = 4 * rows
    stream = np.concatenate([batch_rows(5, step, rows, size) for step in range(steps)])
    assert len(stream) == steps * size
    for epoch in range(len(stream) // rows):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert len({tuple(stream[e * rows : (e + 1) * rows]) for e in range(4)}) > 1 or rows == 1


def test_the_order_is_a_function_of_seed_and_step():
    late = batch_rows(1, 123, 50, 8)
    np.testing.assert_array_equal(late, batch_rows(1, 123, 50, 8))
    assert (late != batch_rows(2, 123, 50, 8)).any()


def test_a_row_that_does_not_fit_is_dropped_whole_and_counted(tokenizer):
    records = [Record("short", "", "yes", "yes"), Record("long " * 200, "", "yes", "yes")]
    lengths = [len(encode_example(tokenizer, record, [EOS], 10**6, BOS).tokens) for record in records]
    kept, dropped = encode_records(tokenizer, records, MODEL, lengths[0], BOS)
    assert (len(kept), dropped) == (1, 1)
    assert len(kept[0].tokens) == lengths[0]
    assert len(encode_records(tokenizer, records, MODEL, lengths[1], BOS)[0]) == 2
    with pytest.raises(UserError, match=f"all 2 dev rows are longer than data.max_length {lengths[0] - 1}"):
        encode_records(tokenizer, records, MODEL, lengths[0] - 1, BOS, "dev")


def test_training_and_inference_see_the_same_prompt_tokens(tokenizer):
    record = Record("Say héllo ☃", "to 世界", "hi there", "hi")
    example = encode_example(tokenizer, record, [EOS], 10**6, BOS)
    prompt = encode_prompt(tokenizer, prompt_text(record), "bos")
    assert example.tokens[: example.prompt_length].tolist() == prompt
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert example.tokens[-1] == EOS
    assert tokenizer.decode(example.tokens[example.prompt_length : -1]) == "hi there"


def example(prompt, response):
    return Example(np.arange(10, 10 + prompt + response, dtype=np.int32), prompt)


def test_a_control_token_written_in_a_record_is_plain_text(tokenizer):
    record = Record("Say <s> twice", "", "</s> and <pad>", "x")
    example = encode_example(tokenizer, record, [EOS], 500, BOS)
    assert example.tokens.tolist().count(EOS) == 1
    assert example.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert tokenizer.pad_token_id not in example.tokens
    assert "</s> and <pad>" in tokenizer.decode(example.tokens, skip_special_tokens=True)


def test_collate_marks_prompt_response_and_padding():
    batch = collate([[example(3, 2)], [example(1, 1)]], length=6, rows=3)
    np.testing.assert_array_equal(batch.tokens, [[10, 11, 12, 13, 14, 0], [10, 11, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 4, 0], [0, 1, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.prompt_mask, [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6])


def test_prompts_are_padded_on_the_right():
    batch = collate_prompts([[5, 6], [7, 8, 9]], length=4, pad_id=0, rows=3)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 0, 0], [7, 8, 9, 0], [0] * 4])
    assert batch.segment_ids.sum(axis=1).tolist() == [2, 3, 1]
    assert (batch.prompt_mask == (batch.segment_ids > 0)).all()
    assert not batch.loss_mask.any()


def test_lengths_are_rounded_up_to_the_limit():
    assert [padded_length(n, 32, 100) for n in (1, 32, 33, 97, 100)] == [32, 32, 64, 100, 100]


def test_a_tokenizer_that_brings_code_is_refused_and_its_code_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "my.py").write_text(f"open({str(marker)!r}, 'w')\n")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["my.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    assert not marker.exists()


def test_settings_of_a_tokenizer_that_are_no_object_are_one_line(tmp_path):
    write_tokenizer(tmp_path, 320)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path, content):
    folder = tmp_path / "m"
    if content is not None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
