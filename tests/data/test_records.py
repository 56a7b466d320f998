"""Records: both schemas, every way a file can be wrong, and the real data sets where they are there."""

import json

import pytest

from milora_jax.data.dev_rows import holdout
from milora_jax.data.prompts import prompt_text
from milora_jax.data.records import Record, fingerprint, read_records
from milora_jax.data.sources import Source, parse_sources
from milora_jax.errors import UserError

GOOD = {"instruction": "Say two.", "input": "", "output": "It is two.", "answer": "2"}
MATHS = {"question": "1 + 1?", "answer": "One and one <<1+1=2>>2.\n#### 1,002"}


def write(path, *rows, as_list=False):
    if as_list:
        path.write_text(json.dumps(list(rows), indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path.stem, str(path))


@pytest.mark.parametrize("as_list", [False, True])
def test_both_schemas_from_both_kinds_of_file(tmp_path, as_list):
    path = tmp_path / ("rows.json" if as_list else "rows.jsonl")
    no_answer = {"instruction": "Hi", "output": " hello "}
    records = read_records(write(path, GOOD, MATHS, no_answer, as_list=as_list))
    assert records == [
        Record("Say two.", "", "It is two.", "2"),
        Record("1 + 1?", "", "One and one 2.\nThe answer is 1002.", "1002"),
        Record("Hi", "", " hello ", "hello"),
    ]


BROKEN = {
    "not json": ("{", r":3: not JSON"),
    "no object": ("[1]", r":3: expected an object, found list"),
    "no output": ('{"instruction": "x"}', r":3: field 'output' holds nothing, expected text"),
    "no instruction": ('{"output": "x"}', r":3: field 'instruction' holds nothing, expected text"),
    "wrong type": ('{"instruction": "x", "output": 3}', r":3: field 'output' holds int, expected text"),
    "null": (
        '{"instruction": null, "output": "x"}',
        r":3: field 'instruction' holds NoneType",
    ),
    "empty output": ('{"instruction": "x", "output": "  "}', r":3: field 'output' is empty"),
    "empty answer": ('{"instruction": "x", "output": "y", "answer": ""}', r":3: field 'answer' is empty"),
    "no number": ('{"question": "x", "answer": "seven"}', r":3: answer does not end in '#### NUMBER'"),
    "twice": (
        '{"instruction": "a", "output": "GOOD", "output": "BAD"}',
        r":3: .*the name 'output' occurs twice",
    ),
    "twice within": (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        r":3: .*the name 'content' occurs twice",
    ),
    "renamed": (
        '{"instruction": "x", "context": "y", "response": "z"}',
        r":3: field 'output' holds nothing, expected text: the row has 'instruction', 'context', "
        "'response', and data.columns maps",
    ),
    "references": ('{"instruction": "x", "output": "y", "references": {"a": 1}}', r"'references' holds dict"),
    "no reference": (
        '{"instruction": "x", "references": ["a", 3]}',
        r"'references\[1\]' holds int, expected text",
    ),
    "blank reference": ('{"instruction": "x", "references": [" "]}', r"field 'references\[0\]' is empty"),
    "digits": ("9" * 5000, r":3: not JSON that can be read"),
    "nesting": ("[" * 100_000, r":3: not JSON that can be read"),
    "surrogate": ('{"instruction": "\\ud800", "output": "x"}', r":3: field 'instruction' holds a lone"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, case):
    line, message = BROKEN[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_records(Source("rows", str(path)))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_malformed_row_of_a_list_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n {"instruction": "a", "output": "b"},\n\n {"instruction": "a",\n "output": 7}\n]')
    with pytest.raises(UserError, match=r"rows\.json:4 \(row 2\): field 'output' holds int"):
        read_records(Source("rows", str(path)))


def test_a_doubled_name_in_a_list_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        '[\n {"instruction": "a", "output": "b"},\n\n {"instruction": "a",\n "x": {"y": 1, "y": 1}}\n]'
    )
    with pytest.raises(UserError, match=r"rows\.json:4 \(row 2\): .*the name 'y' occurs twice"):
        read_records(Source("rows", str(path)))


def test_null_is_absent(tmp_path):
    nothing = dict.fromkeys(("input", "answer", "references", "system", "history", "messages", "question"))
    row = {"instruction": "x", "output": " y ", **nothing}
    assert read_records(write(tmp_path / "rows.jsonl", row)) == [Record("x", "", " y ", "y")]
    row = {"instruction": "x", "output": None, "answer": "y"}
    assert read_records(write(tmp_path / "rows.jsonl", row), scored=True) == [Record("x", "", "", "y")]
    with pytest.raises(UserError, match="field 'output' holds NoneType, expected text"):
        read_records(write(tmp_path / "rows.jsonl", row))


@pytest.mark.parametrize("scored", [False, True])
def test_references_are_read_and_the_first_is_the_output_where_there_is_none(tmp_path, scored):
    row = {"instruction": "x", "references": ["a ", "b"]}
    more = [row, {**row, "output": ""}, {**row, "output": "c", "answer": "d"}, {**row, "references": "e"}]
    assert read_records(write(tmp_path / "rows.jsonl", *more), scored) == [
        *[Record("x", "", "a ", "a", references=("a ", "b"))] * 2,
        Record("x", "", "c", "d", references=("a ", "b")),
        Record("x", "", "e", "e", references=("e",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "the data set is empty"),
        ("rows.json", b"[]", "the data set is empty"),
        ("rows.json", b'{"a": 1}', "expected a JSON list"),
        ("rows.json", b"[\n{]", ":2: not JSON"),
        ("rows.jsonl", b'\n{"instruction": "\xff"}', ":2: not UTF-8"),
        ("rows.csv", b"a,b", "suffix '.csv': expected .json or .jsonl"),
    ],
)
def test_a_file_that_is_no_data_set(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_records(Source("rows", str(tmp_path / name)))
    assert message in str(caught.value)


def test_a_scored_row_needs_an_answer_but_no_output(tmp_path):
    source = write(tmp_path / "rows.jsonl", {**GOOD, "output": ""})
    assert read_records(source, scored=True)[0].answer == "2"
    with pytest.raises(UserError, match="field 'output' is empty"):
        read_records(source)
    source = write(tmp_path / "rows.jsonl", GOOD, {"instruction": "x", "output": ""})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: field 'output' is empty"):
        read_records(source, scored=True)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_records(Source("x", str(tmp_path / "no.jsonl")))


def test_a_mark_at_the_start_of_a_file_is_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_records(Source("rows", str(path)))[0].output == "It is two."


def test_source_names():
    text = "a/gsm8k/test.jsonl, b/x.json,mine=c/y.json,hf:org/set:en"
    names = [source.name for source in parse_sources(text)]
    assert names == ["gsm8k", "x", "mine", "set"]
    assert parse_sources("") == []
    assert parse_sources("data/run=3/rows.json")[0].location == "data/run=3/rows.json"
    for text in ("a/test.jsonl,b/../a/test.jsonl", "=x.json", "x="):
        with pytest.raises(UserError, match="data source"):
            parse_sources(text)


def held_out(records, *settings, **more):
    """Both parts as lists."""
    train, dev = holdout(records, *settings, **more)
    return list(train), list(dev)


def test_held_out_rows_depend_on_the_seed_alone():
    records = [Record(str(i), "", "x", "x") for i in range(100)]
    train, dev = held_out(records, 0.1, seed=3)
    assert (len(train), len(dev)) == (90, 10)
    assert sorted([*train, *dev], key=lambda r: int(r.instruction)) == records
    assert held_out(records, 0.1, seed=3) == (train, dev)
    assert held_out(records, 0.1, seed=4)[1] != dev
    assert [len(part) for part in held_out(records[:2], 0.9, seed=0)] == [1, 1]
    with pytest.raises(UserError, match="too few"):
        holdout(records[:1], 0.5, seed=0)


def test_held_out_rows_can_be_limited():
    records = [Record(str(i), "", "x", "x") for i in range(100)]
    train, dev = held_out(records, 0.1, seed=3, limit=4)
    assert (len(train), len(dev)) == (96, 4)
    assert set(dev) < set(held_out(records, 0.1, seed=3)[1])
    assert len(held_out(records, 0.1, seed=3, limit=40)[1]) == 10


def test_a_fingerprint_sees_every_field_and_the_order():
    one, two = Record("a", "", "b", "c"), Record("a", "", "b", "d")
    prints = [fingerprint(rows) for rows in ([one], [two], [one, two], [two, one])]
    assert len(set(prints)) == 4
    assert fingerprint([one, two]) == prints[2]


def test_the_template_holds_the_input_only_where_there_is_one():
    without, given = prompt_text(Record("Do.", "", "x", "x")), prompt_text(Record("Do.", "this", "x", "x"))
    assert "### Input:" not in without
    assert "### Instruction:\nDo.\n\n### Input:\nthis\n\n### Response:\n" in given
    assert without.endswith("### Instruction:\nDo.\n\n### Response:\n")


REAL = {
    "gsm8k/train.jsonl": 7473,
    "gsm8k/test.jsonl": 1319,
    "llm_adapters/boolq/train.json": 9427,
    "llm_adapters/ARC-Easy/test.json": 2376,
    "llm_adapters/ARC-Challenge/test.json": 1172,
    "llm_adapters/openbookqa/test.json": 500,
    "llm_adapters/AQuA/test.json": 254,
    "e2e_cleaned/train.jsonl": 3941,
    "e2e_cleaned/test.jsonl": 1847,
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", REAL)
def test_real_data_sets_are_read_whole(shared_data, name):
    records = read_records(Source("real", str(shared_data / name)))
    assert len(records) == REAL[name]
    assert all(bool(record.references) == (name == "e2e_cleaned/test.jsonl") for record in records)
    if name.startswith("gsm8k"):
        assert all("<<" not in record.output for record in records)
        assert all(record.output.endswith(f"The answer is {record.answer}.") for record in records)
