"""Preference rows: read, refused by file and row, encoded as SFT rows are, and kept together."""

import json

import numpy as np
import pytest

from milora_jax.data.batches import collate
from milora_jax.data.packing import Rows
from milora_jax.data.preferences import encode_preferences, reader_of
from milora_jax.data.records import Record, fingerprint, read_records, record_bytes
from milora_jax.data.sources import Source
from milora_jax.data.stored import INDEX, StoredExamples, writing
from milora_jax.data.tokens import Example, encode_example, load_tokenizer
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat
from milora_jax.tiny import MODEL_DIR
from tests.models import TINY

PAIR = {"prompt": "Say hi.", "chosen": "hi", "rejected": "hello there"}
JUDGED = {"prompt": "Say hi.", "completion": "hi", "label": True}
ASKED = [{"role": "user", "content": "Say hi."}]


def said(text):
    return [{"role": "assistant", "content": text}]


def read(tmp_path, objective, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(Source("rows", str(path)), reader=reader_of(objective))


@pytest.mark.parametrize(
    ("objective", "row", "expected"),
    [
        ("dpo", PAIR, Record("Say hi.", "", "hi", "hi", rejected="hello there")),
        (
            "ipo",
            {**PAIR, "score": 0.5, "label": 1},
            Record("Say hi.", "", "hi", "hi", rejected="hello there"),
        ),
        ("kto", {**JUDGED, "label": False}, Record("Say hi.", "", "hi", "hi", label=False)),
    ],
)
def test_a_text_is_the_instruction_of_a_record(objective, row, expected, tmp_path):
    assert read(tmp_path, objective, row) == [expected]


def test_the_conversational_forms_are_one_record(tmp_path):
    chosen, rejected = said("hi"), said("hello there")
    explicit = {"prompt": ASKED, "chosen": chosen, "rejected": rejected}
    repeated = {"prompt": ASKED, "chosen": ASKED + chosen, "rejected": ASKED + rejected}
    implicit = {"chosen": ASKED + chosen, "rejected": ASKED + rejected}
    found = read(tmp_path, "orpo", explicit, repeated, implicit)
    assert found[0] == found[1] == found[2]
    assert [message.content for message in found[0].messages] == ["Say hi."]
    assert (found[0].output, found[0].rejected) == ("hi", "hello there")
    (judged,) = read(tmp_path, "kto", {"prompt": ASKED, "completion": chosen, "label": True})
    assert (judged.messages, judged.output, judged.label) == (found[0].messages, "hi", True)
    (told,) = read(tmp_path, "dpo", {**PAIR, "system": "Be brief."})
    assert [message.role for message in told.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        ("dpo", {**PAIR, "rejected": "hi "}, "fields 'chosen' and 'rejected' are equal"),
        ("dpo", {**PAIR, "chosen": " "}, "field 'chosen' is empty"),
        ("dpo", {**PAIR, "prompt": ""}, "field 'prompt' holds nothing"),
        (
            "dpo",
            JUDGED,
            "field 'chosen' holds nothing, the objective learns from prompt, chosen and rejected",
        ),
        ("dpo", {**PAIR, "instruction": "Do."}, "field 'instruction' stands beside 'chosen'"),
        ("dpo", {**PAIR, "images": ["a.png"]}, "field 'images' is not supported"),
        ("dpo", {"instruction": "a", "output": "b"}, "the row has 'instruction', 'output'"),
        ("orpo", {"chosen": ASKED + said("a"), "rejected": said("b")}, "field 'rejected'"),
        (
            "orpo",
            {
                "chosen": ASKED + said("a"),
                "rejected": [{"role": "user", "content": "Other."}, *said("b")],
            },
            "the prompt is no prefix of both answers",
        ),
        (
            "dpo",
            {"prompt": ASKED, "chosen": ASKED + said("a"), "rejected": ASKED[:0]},
            "field 'rejected': expected one message of the assistant",
        ),
        ("kto", {**JUDGED, "label": 1}, "field 'label' is 1, expected true or false"),
        ("kto", {**JUDGED, "label": "yes"}, "field 'label' is 'yes', expected true or false"),
        ("kto", {**JUDGED, "completion": ""}, "field 'completion' is empty"),
        ("kto", PAIR, "field 'completion' holds nothing, the objective learns from prompt, completion"),
        ("sft", PAIR, "field 'chosen' is not supported: it is of pairs, which train.objective=dpo"),
        ("sft", JUDGED, "rows with 'completion' and 'label' are for train.objective=kto"),
    ],
)
def test_what_is_no_preference_is_refused_by_file_and_row(objective, row, message, tmp_path):
    good = {"dpo": PAIR, "orpo": PAIR, "kto": JUDGED}.get(objective, {"instruction": "a", "output": "b"})
    with pytest.raises(UserError) as caught:
        read(tmp_path, objective, good, row)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert message in str(caught.value)


def test_the_fingerprint_of_other_rows_stays_and_that_of_pairs_tells_answers_apart():
    plain = Record("a", "", "b", "b")
    assert b"rejected" not in record_bytes(plain)
    assert b"label" not in record_bytes(plain)
    pairs = [Record("a", "", "b", "b", rejected=other) for other in ("c", "d")]
    labels = [Record("a", "", "b", "b", label=label) for label in (True, False)]
    assert len({fingerprint([record]) for record in (plain, *pairs, *labels)}) == 5


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODEL_DIR))


WIDE = TINY.__class__(**{**vars(TINY), "vocab_size": 4096})


def encoded(tokenizer, records, max_length=200):
    kept = []
    written = PromptFormat(special_tokens="bos")
    encode_preferences(kept.append, tokenizer, records, WIDE, max_length, written)
    return kept


def test_each_answer_has_the_tokens_of_an_sft_row(tokenizer):
    record = Record("Say hi.", "", "hi", "hi", rejected="hello there")
    found = encoded(tokenizer, [record])
    assert [example.label for example in found] == [True, False]
    for example, output in zip(found, ("hi", "hello there"), strict=True):
        alone = Record("Say hi.", "", output, output)
        expected = encode_example(tokenizer, alone, WIDE.eos_ids, 200, PromptFormat(special_tokens="bos"))
        np.testing.assert_array_equal(example.tokens, expected.tokens)
        assert example.prompt_length == expected.prompt_length


def test_a_judged_answer_stands_beside_that_of_the_row_before(tokenizer):
    records = [Record(f"Say {i}.", "", "7" * i, "", label=i % 2 == 0) for i in (1, 2, 3)]
    found = encoded(tokenizer, records)
    assert [example.label for example in found[::2]] == [False, True, False]
    own = [example.tokens[example.prompt_length :].tolist() for example in found[::2]]
    other = [example.tokens[example.prompt_length :].tolist() for example in found[1::2]]
    assert other == [own[1], own[0], own[1]]
    for example, mismatched in zip(found[::2], found[1::2], strict=True):
        length = example.prompt_length
        np.testing.assert_array_equal(example.tokens[:length], mismatched.tokens[:length])
    longest = max(len(example.tokens) for example in found[::2])
    cut = encoded(tokenizer, records, longest)
    assert max(len(example.tokens) for example in cut) == longest


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("a", "", "b", "b", rejected="c" * 200, where="f:3"), "the prompt with 'rejected' has"),
        (Record("a", "", "c" * 200, "b", label=True, where="f:3"), "the prompt with 'completion' has"),
    ],
)
def test_an_answer_that_is_too_long_is_refused(record, message, tokenizer):
    with pytest.raises(UserError, match=f"f:3: {message}.*expected at most data.max_length 100"):
        encoded(tokenizer, [record], 100)


def test_one_judged_answer_is_too_few(tokenizer):
    with pytest.raises(UserError, match="one judged answer is too few"):
        encoded(tokenizer, [Record("a", "", "b", "b", label=True)])


def example(prompt, response, first=10, label=True):
    return Example(np.arange(first, first + prompt + response, dtype=np.int32), prompt, label=label)


PAIRS = [example(2, 1), example(2, 2, 20, False), example(1, 1, 30), example(1, 3, 40, False)]


def test_the_answers_to_a_prompt_share_a_row_and_its_route():
    assert list(Rows(PAIRS, None, 2)) == [PAIRS[:2], PAIRS[2:]]
    packed = Rows(PAIRS, 13, 2)
    assert list(packed) == [PAIRS]
    assert (packed.lengths.tolist(), packed.prompts) == ([13], 2)
    assert len(Rows(PAIRS, 12, 2)) == 2
    batch = collate([PAIRS], 14, 2, prompts=2, answers=2)
    np.testing.assert_array_equal(batch.segment_ids[0], [1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4, 0])
    np.testing.assert_array_equal(batch.loss_mask[0], [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(batch.labels, [[True, True], [False, False]])
    members = np.zeros((2, 2, 14), bool)
    members[0, 0, :2] = members[0, 1, 7] = True
    np.testing.assert_array_equal(batch.members, members)
    np.testing.assert_array_equal(batch.present, [[True, True], [False, False]])


def test_labels_are_kept_in_files(tmp_path):
    with writing(tmp_path, "train", [""]) as writer:
        for each in PAIRS:
            writer.append(each)
    index, answers = ((tmp_path / f"train{kind}").read_bytes() for kind in (INDEX, ".answers"))
    stored = StoredExamples(tmp_path / "train.tokens", index, answers, [""])
    assert [each.label for each in stored] == [True, False, True, False]
    assert [len(each.tokens) for each in Rows(stored, None, 2)[1]] == [2, 4]
