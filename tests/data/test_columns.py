"""``data.columns``: its syntax, the rows that come of it, and where it is honoured."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

from milora_jax.columns import Column, columns_of, mapped_row, parse_columns, require_sources
from milora_jax.config import Config, DataSection
from milora_jax.data.chat import Message
from milora_jax.data.records import Record, read_records
from milora_jax.data.sources import Source, parse_given, parse_sources, run_sources
from milora_jax.errors import UserError

ASK = "Write one sentence about the restaurant."
E2E = f'instruction="{ASK}",input=meaning_representation,references=human_reference'
"""As docs/data.md says for E2E of the Hub."""

HUB = [
    {"meaning_representation": "name[A]", "human_reference": "A is a pub."},
    {"meaning_representation": "name[B]", "human_reference": "There is B."},
    {"meaning_representation": "name[A]", "human_reference": "The pub A."},
    {"meaning_representation": "name[A]", "human_reference": "A is a pub."},
]


def parsed(text):
    return [(c.source, c.field, c.column, c.text) for c in parse_columns(text)]


def test_entries():
    assert parsed("") == parsed("  ") == []
    assert parsed(E2E) == [
        ("", "instruction", "", ASK),
        ("", "input", "meaning_representation", ""),
        ("", "references", "human_reference", ""),
    ]
    assert parsed("""a : output = the answer (long) , b:system='Say "yes", please: a=b',b:tools=,""") == [
        ("a", "output", "the answer (long)", ""),
        ("b", "system", "", 'Say "yes", please: a=b'),
        ("b", "tools", "", ""),
    ]
    assert parsed("input=a=b:c") == [("", "input", "a=b:c", "")]
    text = "x:input=a, output=b"
    assert ",".join(column.entry for column in parse_columns(text)) == "x:input=a,output=b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instruction", "data.columns 'instruction': expected entries"),
        ("=a", "data.columns '=a': expected entries"),
        ("input=a,,output=b", "data.columns ',output=b': expected entries"),
        ('instruction="a', "data.columns 'instruction=\"a': expected entries"),
        ('instruction="a"b', "expected entries"),
        ("instruction=' '", "expected a text that is not blank"),
        ("outptu=a", "data.columns: the field is 'outptu': expected one of .*did you mean 'output'"),
        ('output="yes"', "the field of a text is 'output': expected one of instruction, input, system"),
        ("a:input=x,a:input=y", "'a:input=y': 'input' stands there twice"),
    ],
)
def test_what_cannot_be_read_is_named_when_the_config_is_made(text, message):
    with pytest.raises(UserError, match=message) as caught:
        Config.from_dict({"data": {"columns": text}})
    assert "\n" not in str(caught.value)


def test_a_source_has_its_own_entries_and_those_of_all():
    columns = parse_columns("input=a,output=b,x:output=c,y:system=d")
    assert [c.entry for c in columns_of(columns, "x")] == ["x:output=c", "input=a", "output=b"][:2]
    assert [c.entry for c in columns_of(columns, "z")] == ["input=a", "output=b"]
    with pytest.raises(UserError, match="'y:system=d': there is no source 'y', expected x, z"):
        require_sources(columns, ["z", "x"])


def test_a_row_that_has_the_fields_themselves_needs_no_mapping():
    columns = parse_columns("input=mr,references=human,output=text")
    row = {"instruction": "Say it.", "input": "a", "output": "b"}
    assert mapped_row(row, columns, "f:1") == row
    given = {"instruction": "Say it.", "mr": "a", "human": "b", "text": "c"}
    expected = {"instruction": "Say it.", "input": "a", "references": "b", "output": "c"}
    assert mapped_row(given, columns, "f:1") == expected
    both = {**row, "mr": "x"}
    assert mapped_row(both, columns, "f:1")["input"] == "x"
    with pytest.raises(UserError, match="there is no column 'human'"):
        mapped_row({"instruction": "Say it.", "mr": "a"}, parse_columns("references=human"), "f:1")


def test_a_mapped_row():
    columns = parse_columns('instruction="Say it.",input=output,output=input,tools=')
    row = {"input": "a", "output": "b", "id": 3, "tools": ["x"]}
    assert mapped_row(row, columns, "f:1") == {"id": 3, "instruction": "Say it.", "input": "b", "output": "a"}
    with pytest.raises(UserError) as caught:
        mapped_row({"text": 1, "label": 2}, parse_columns("output=labels"), "f.jsonl:7")
    assert str(caught.value) == (
        "f.jsonl:7: there is no column 'labels' as in data.columns 'output=labels', "
        "the row has 'text', 'label'"
    )


@pytest.fixture
def hub(monkeypatch):
    rows = {("tuetschek/e2e_nlg", split): HUB for split in ("train", "validation", "test")}
    rows |= {
        ("Open-Orca/OpenOrca", "train"): [{"system_prompt": "Be brief.", "question": "a", "response": "b"}]
    }

    def load_dataset(name, config, split):
        return rows[name, split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_e2e_of_the_hub(hub):
    """Every pair is learned; what is scored is one question a meaning, with all of its references."""
    (train,) = parse_sources("e2e=hf:tuetschek/e2e_nlg", E2E)
    (test,) = parse_sources("e2e=hf:tuetschek/e2e_nlg::test", E2E)
    assert read_records(train) == [
        Record(ASK, row["meaning_representation"], text, text, references=(text,))
        for row in HUB
        if (text := row["human_reference"])
    ]
    scored = read_records(test, scored=True)
    first = Record(ASK, "name[A]", "A is a pub.", "A is a pub.", references=("A is a pub.", "The pub A."))
    other = Record(ASK, "name[B]", "There is B.", "There is B.", references=("There is B.",))
    assert scored == [first, other]
    assert [record.where for record in scored] == [f"hf:tuetschek/e2e_nlg::test (row {i})" for i in (1, 2)]
    plain = dataclasses.replace(test, columns=parse_columns(E2E.replace("references", "output")))
    assert len(read_records(plain, scored=True)) == 4, "rows are put together where the references are mapped"


def test_a_system_prompt_under_another_name(hub):
    columns = "instruction=question,output=response,system=system_prompt"
    (record,) = read_records(*parse_sources("hf:Open-Orca/OpenOrca", columns))
    assert record == Record("a", "", "b", "b", (Message("system", "Be brief."), Message("user", "a")))
    columns = columns.replace("system=system_prompt", "system_prompt=")
    assert read_records(*parse_sources("hf:Open-Orca/OpenOrca", columns)) == [Record("a", "", "b", "b")]


def rows(path, *values):
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


def test_rows_with_other_answers_stay_apart(tmp_path):
    path = rows(
        tmp_path / "rows.jsonl",
        {"instruction": "a", "output": "x", "answer": "1", "texts": ["x", "y"]},
        {"instruction": "a", "output": "z", "answer": "2", "texts": None},
        {"instruction": "a", "output": "v", "answer": "1", "texts": None},
        {"instruction": "a", "output": "w", "answer": "w", "texts": ["w"]},
    )
    found = read_records(*parse_sources(str(path), "references=texts"), scored=True)
    assert [(r.answer, r.references) for r in found] == [("1", ("x", "y", "v")), ("2", ("z",)), ("w", ("w",))]


def test_sources_may_be_mixed_and_their_lists_of_messages_renamed(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    one = rows(tmp_path / "one.jsonl", {"conversation": chat, "instruction": "kind"})
    two = rows(tmp_path / "two.jsonl", {"instruction": "a", "output": "b"})
    sources = parse_sources(f"{one},{two}", "one:messages=conversation,one:instruction=")
    first, second = (read_records(source) for source in sources)
    assert first == [Record("a", "", "b", "b", (Message("user", "a"),))]
    assert second == [Record("a", "", "b", "b")]
    with pytest.raises(UserError, match=r"two\.jsonl:1: there is no column 'conversation'"):
        read_records(parse_sources(str(two), "messages=conversation")[0])


def test_a_run_and_a_command_refuse_columns_of_a_source_that_there_is_not():
    data = DataSection(train="a=x.json", dev="b=x.json", test="c=x.json", columns="b:input=x,c:output=y")
    found = run_sources(data)
    assert [c.entry for c in found["test"][0].columns] == ["c:output=y"]
    assert found["train"] == [Source("a", "x.json")]
    with pytest.raises(UserError, match="there is no source 'd', expected a, b, c"):
        run_sources(dataclasses.replace(data, columns="d:input=x"))
    assert parse_given("", "") == []
    column = Column("", "input", "x", "", "input=x")
    assert parse_given("a=x.json", "input=x") == [Source("a", "x.json", (column,))]
    for arguments, message in {
        ("", "input=x"): "--columns 'input=x' is about the rows of --data",
        (",", ""): "--data ',' names no file",
        ("a=x.json", "b:input=x"): "there is no source 'b', expected a",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_given(*arguments)


@pytest.mark.thorough
def test_both_forms_of_e2e_give_the_same_records(shared_data, tmp_path):
    """Local files need no columns: a row for each pair to learn, one with all references to score."""
    folder = shared_data / "e2e_cleaned"
    train = read_records(Source("e2e", str(folder / "train.jsonl")))
    test = read_records(Source("e2e", str(folder / "test.jsonl")), scored=True)
    assert (len(train), len(test)) == (3941, 1847)
    assert len({(record.instruction, record.input) for record in test}) == 1847
    assert all(record.references[0] == record.output for record in test)
    assert not any(record.references for record in train)
    # On the Hub every pair has a row of its own, and no instruction.
    pairs = [{"mr": record.input, "ref": text} for record in test for text in record.references]
    assert len(pairs) > len(test)
    columns = f'instruction="{test[0].instruction}",input=mr,references=ref'
    (source,) = parse_sources(str(rows(tmp_path / "hub.jsonl", *pairs)), columns)
    same = [dataclasses.replace(r, references=tuple(dict.fromkeys(r.references))) for r in test]
    assert read_records(source, scored=True) == same
    assert len(read_records(source)) == len(pairs)
