"""Plain texts: which rows are such, how they are cut, what of them is a prompt and what is learned."""

import dataclasses
import json

import numpy as np
import pytest

from milora_jax.data.batches import collate
from milora_jax.data.records import fingerprint, read_records
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_into, encode_text, load_tokenizer
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat
from milora_jax.tiny import MODEL_DIR
from tests.models import WITH_TOKENIZER

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")

EOS = (2,)
TEXT = "The sky is blue. " * 7


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL_DIR))


def records_of(tmp_path, *rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(Source("texts", str(path)), **more)


def pieces(tokenizer, record, length, prompt_tokens, special="bos"):
    return encode_text(tokenizer, record, EOS, length, PromptFormat(special_tokens=special), prompt_tokens)


@pytest.mark.parametrize("special", ["bos", "none"])
@pytest.mark.parametrize("length", [9, 13, 1000])
def test_the_pieces_together_are_the_text_and_its_end(special, length, tokenizer, tmp_path):
    (record,) = records_of(tmp_path, {"text": TEXT})
    assert (record.output, record.is_text) == (TEXT, True)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    start = [tokenizer.bos_token_id] if special == "bos" else []
    found, left = pieces(tokenizer, record, length, 0, special)
    assert left == 0
    assert all(example.tokens[: len(start)].tolist() == start for example in found)
    assert [token for e in found for token in e.tokens[len(start) :].tolist()] == [*ids, *EOS]
    assert {len(example.tokens) for example in found[:-1]} <= {length}
    assert len(found[-1].tokens) <= length


@pytest.mark.parametrize("prompt_tokens", [0, 1, 4])
def test_the_prompt_is_not_learned_and_all_behind_it_is(prompt_tokens, tokenizer, tmp_path):
    (record,) = records_of(tmp_path, {"text": TEXT})
    found, _ = pieces(tokenizer, record, 11, prompt_tokens)
    batch = collate([found], sum(len(example.tokens) for example in found), 1, len(found))
    place = np.concatenate([np.arange(len(example.tokens)) for example in found])
    np.testing.assert_array_equal(batch.loss_mask[0], place >= max(prompt_tokens, 1))
    np.testing.assert_array_equal(batch.prompt_mask[0], place < max(prompt_tokens, 1))


def test_a_piece_that_is_no_longer_than_its_prompt_is_left_out_and_counted(tokenizer, tmp_path):
    count = len(tokenizer.encode(TEXT, add_special_tokens=False)) + 1  # and its end
    (record,) = records_of(tmp_path, {"text": TEXT})
    length = 1 + (count - 3) // 2  # behind the first token: two full pieces, and one of three or four
    last = count - 2 * (length - 1)
    assert [len(pieces(tokenizer, record, length, prompt)[0]) for prompt in (last, last + 1)] == [3, 2]
    assert pieces(tokenizer, record, length, last + 1)[1] == 1
    kept = []
    model = dataclasses.replace(WITH_TOKENIZER, eos_ids=EOS, vocab_size=1000)
    left = encode_into(kept.append, tokenizer, [record], model, length, PromptFormat(), "training", last + 1)
    assert (len(kept), left.long, left.short) == (2, 0, 1)
    short = dataclasses.replace(record, output="The sky")
    with pytest.raises(UserError, match=r"all training rows are texts of at most data\.prompt_tokens 30 tok"):
        encode_into(kept.append, tokenizer, [short], model, 40, PromptFormat(), "training", 30)


def test_control_tokens_in_a_text_are_text(tokenizer, tmp_path):
    (record,) = records_of(tmp_path, {"text": "one</s>two"})
    (example,), _ = pieces(tokenizer, record, 100, 0)
    assert example.tokens.tolist().count(EOS[0]) == 1


def test_a_text_column_beside_a_question_is_still_ignored(tmp_path):
    row = {"instruction": "say hi", "output": "hi", "text": "Below is an instruction ..."}
    (with_text,), (without,) = (
        records_of(tmp_path, each) for each in (row, {name: row[name] for name in ("instruction", "output")})
    )
    assert with_text == without
    assert not with_text.is_text
    (text,) = records_of(tmp_path, {"text": "hi", "id": 3})
    assert fingerprint([text]) != fingerprint([dataclasses.replace(text, is_text=False)])


@pytest.mark.parametrize(
    ("row", "scored", "message"),
    [
        ({"text": " "}, False, "field 'text' is empty"),
        ({"text": 3}, False, "field 'text' holds int, expected text"),
        ({"text": "a", "output": "b"}, False, "field 'output' stands beside 'text'"),
        ({"text": "a", "label": 1}, False, r"field 'label' stands beside 'text'.* data.columns=label="),
        ({"text": "a"}, True, "the row is a plain text, which asks nothing"),
    ],
)
def test_texts_that_could_be_something_else_are_refused(row, scored, message, tmp_path):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        records_of(tmp_path, row, scored=scored)


def test_a_text_has_no_system_message_to_route_on(tokenizer, tmp_path):
    (record,) = records_of(tmp_path, {"text": "one two"})
    routed = PromptFormat(template="chat", route_on="system")
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: adapter\.route_on is 'system', and the prompt is no"
    ):
        encode_text(tokenizer, record, EOS, 10, routed, 2)
