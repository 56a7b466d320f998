"""Chats in files: both forms, a record for each turn, and every way a row can be wrong."""

import hashlib
import itertools
import json
from dataclasses import asdict, replace

import pytest

from milora_jax.config import DataSection
from milora_jax.data.chat import Message
from milora_jax.data.conversations import read_chat
from milora_jax.data.dev_rows import first_rows, holdout
from milora_jax.data.prompts import prompt_messages
from milora_jax.data.records import Record, Records, fingerprint, read_question, read_records
from milora_jax.data.sources import Source, run_sources
from milora_jax.errors import UserError

SYSTEM, ASK, SAY, MORE, END = (
    Message("system", "Be brief."),
    Message("user", "1 + 1?"),
    Message("assistant", " 2 "),
    Message("user", "And 1?"),
    Message("assistant", "3"),
)
RECORDS = [
    Record("1 + 1?", "", " 2 ", "2", (SYSTEM, ASK)),
    Record("And 1?", "", "3", "3", (SYSTEM, ASK, SAY, MORE)),
]
OPENAI = {"messages": [asdict(message) for message in (SYSTEM, ASK, SAY, MORE, END)]}
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = {
    "id": "x1",
    "conversations": [{"from": NAMES[m["role"]], "value": m["content"]} for m in OPENAI["messages"]],
}
MATHS = {"question": "1 + 1?", "answer": "#### 2"}
BESIDE = {"system": "Be brief.", "conversations": SHAREGPT["conversations"][1:], "tools": []}


def read(path, *rows, **more):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(Source("rows", str(path)), **more)


@pytest.mark.parametrize("row", [OPENAI, SHAREGPT, BESIDE])
@pytest.mark.parametrize("scored", [False, True])
def test_a_chat_is_a_record_for_each_turn_of_the_assistant(tmp_path, row, scored):
    plain = {"instruction": "Hi", "output": "hello", "messages": None}
    found = read(tmp_path / "rows.jsonl", row, plain, row, scored=scored)
    assert found == [*RECORDS, Record("Hi", "", "hello", "hello"), *RECORDS]


def test_a_chat_of_a_list_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n {"messages": [{"role": "user", "content": "x"}]}\n]')
    with pytest.raises(UserError, match=r"rows\.json:2 \(row 1\): the last message is of the user"):
        read_records(Source("rows", str(path)))


def chat(*pairs, **more):
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


def weighed(**marks):
    """A chat of one answer, with more fields in it."""
    answer = {"role": "assistant", "content": "y", **marks}
    return {"messages": [{"role": "user", "content": "x"}, answer]}


GOOD = [("user", "x"), ("assistant", "y")]
BROKEN = {
    "no list": ({"messages": "x"}, "field 'messages' holds str, expected a list of messages"),
    "no object": ({"messages": ["x"]}, "message 1: expected an object, found str"),
    "no role": ({"messages": [{"content": "x"}]}, "message 1: field 'role' holds nothing"),
    "other form": ({"conversations": OPENAI["messages"]}, "message 1: field 'from' holds nothing"),
    "other role": (chat(("tool", "x")), "message 1 is of the tool, expected one of the user"),
    "other name": ({"conversations": [{"from": "bot", "value": "x"}]}, "one of system, human, gpt"),
    "parts": (chat(("user", [{"type": "text", "text": "x"}])), "message 1: field 'content' holds list"),
    "blank": (chat(("user", "x"), ("assistant", " ")), "message 2: field 'content' is empty"),
    "surrogate": (chat(("user", "\ud800")), "message 1: field 'content' holds a lone surrogate"),
    "nothing": ({"messages": []}, "the chat has no messages of a user"),
    "system alone": (chat(("system", "x")), "the chat has no messages of a user"),
    "late system": (chat(*GOOD, ("system", "x")), "message 3 is of the system, expected one of the user"),
    "answer first": (chat(("assistant", "x")), "message 1 is of the assistant, expected one of the user"),
    "twice": (chat(GOOD[0], GOOD[0]), "message 2 is of the user, expected one of the assistant"),
    "unanswered": (chat(*GOOD, GOOD[0]), "the last message is of the user, expected one of the assistant"),
    "two systems": (chat(("system", "x"), *GOOD, system="y"), "field 'system' stands beside another system"),
    "no text": (chat(*GOOD, system=3), "field 'system' holds int, expected text"),
    "tools": (chat(*GOOD, tools=[{}]), "field 'tools': tool 1: it has no name"),
    "call": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "message 1: field 'tool_calls' is not supported: expected a message without it",
    ),
    "both": (chat(*GOOD, instruction="x"), "the row holds 'messages' and 'instruction'"),
    "history": (chat(*GOOD, history=[["a", "b"]]), "field 'history' stands beside 'messages'"),
    "weight": (weighed(weight=0.5), "message 2: field 'weight' is 0.5, expected 0 or 1"),
    "weight as text": (weighed(weight="0"), "message 2: field 'weight' is '0', expected 0 or 1"),
    "no weight": (weighed(weight=float("nan")), "message 2: field 'weight' is nan, expected 0 or 1"),
    "user learned": (
        {"messages": [{"role": "user", "content": "x", "train": True}, *weighed()["messages"][1:]]},
        "message 1: field 'train' is True, expected 0: only what the assistant says is learned",
    ),
    "contradiction": (weighed(weight=1, train=False), "fields 'weight' and 'train' contradict each other"),
    "nothing learned": (weighed(weight=0), "every answer of the chat has weight 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_chat_is_named_by_file_and_line(tmp_path, case):
    row, message = BROKEN[case]
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError) as caught:
        read(path, OPENAI, row)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_an_answer_of_weight_0_is_history_and_no_record(tmp_path, form, name, scored):
    """As data sets of the Hub have it: a weight of null or 0 beside what is no answer, floats elsewhere."""
    source = OPENAI if form == "messages" else SHAREGPT
    weights = [None, 0.0, 0, None, 1.0]
    row = {form: [{**m, name: w} for m, w in zip(source[form], weights, strict=True)]}
    assert read(tmp_path / "rows.jsonl", row, scored=scored) == RECORDS[1:]
    row = {form: [{**m, name: bool(w)} for m, w in zip(source[form], weights, strict=True)]}
    assert read(tmp_path / "rows.jsonl", row, scored=scored) == RECORDS[1:]


def test_the_turns_around_a_weight_of_0_are_one_row():
    """The answer that is not learned is in the prompt of the next one, so they stay together."""
    ask, said, more = Message("user", "a"), Message("assistant", "b"), Message("user", "c")
    bad, last = Message("assistant", "d"), Message("user", "e")
    records = [Record("a", "", "b", "b", (ask,)), Record("e", "", "f", "f", (ask, said, more, bad, last))]
    assert first_rows([*records, Record("x", "", "y", "y")], 1) == records


SYSTEM_ROW = {
    "system": "You must answer in French.",
    "instruction": "hi",
    "input": "there",
    "output": "salut",
}


@pytest.mark.parametrize("scored", [False, True])
def test_a_plain_row_with_a_system_message_is_a_chat(tmp_path, scored):
    rows = [SYSTEM_ROW, {**SYSTEM_ROW, "system": "", "input": None, "history": []}, {"system": None, **MATHS}]
    first, *others = read(tmp_path / "rows.jsonl", *rows, {**MATHS, "system": "Be brief."}, scored=scored)
    system, asked = Message("system", "You must answer in French."), Message("user", "hi\n\nthere")
    assert first == Record("hi\n\nthere", "", "salut", "salut", (system, asked))
    assert prompt_messages(first) == (system, *prompt_messages(Record("hi", "there", "", "")))
    plain = Record("1 + 1?", "", "The answer is 2.", "2")
    assert others[:2] == [Record("hi", "", "salut", "salut"), plain]
    assert others[2] == replace(plain, messages=(Message("system", "Be brief."), Message("user", "1 + 1?")))


def test_a_history_is_the_turns_before(tmp_path):
    """LLaMA-Factory's, which learns its answers as well."""
    row = {"instruction": "And 1?", "output": "3", "answer": "three", "history": [["1 + 1?", " 2 "]]}
    first, last = read(tmp_path / "rows.jsonl", {**row, "system": "Be brief."})
    assert [first, replace(last, answer="3")] == RECORDS
    assert last.answer == "three"
    for history, message in {
        "x": "field 'history' holds str, expected a list of pairs",
        ("x",): "field 'history': turn 1 is no pair",
        (("a", "b"), ("c",)): "field 'history': turn 2 is no pair",
        (("a", None),): "field 'history': turn 1: field 'answer' holds NoneType, expected text",
        (("", "b"),): "field 'history': turn 1: field 'question' is empty",
    }.items():
        with pytest.raises(UserError, match=f"rows.jsonl:1: {message}"):
            read(tmp_path / "rows.jsonl", {**row, "history": history})


@pytest.mark.parametrize(
    "name",
    "images image videos video audios audio chosen rejected kto_tag chat_template_kwargs functions".split(),
)
@pytest.mark.parametrize("row", [SYSTEM_ROW, OPENAI, MATHS])
def test_fields_of_a_row_that_are_not_supported_are_named(tmp_path, row, name):
    for nothing in (None, "", [], {}, "[]"):
        assert read(tmp_path / "rows.jsonl", {**row, name: nothing})
    value = False if name == "kto_tag" else ["x"]
    with pytest.raises(UserError, match=f"rows.jsonl:2: field {name!r} is not supported: .*{name}= to leave"):
        read(tmp_path / "rows.jsonl", row, {**row, name: value})


@pytest.mark.parametrize(
    "name",
    "tools functions function_call images reasoning_content thinking refusal train_detail audio".split(),
)
def test_fields_of_a_message_that_are_not_supported_are_named(tmp_path, name):
    assert read(tmp_path / "rows.jsonl", weighed(**{name: None})) == read(tmp_path / "rows.jsonl", weighed())
    with pytest.raises(UserError, match=f"rows.jsonl:1: message 2: field {name!r} is not supported"):
        read(tmp_path / "rows.jsonl", weighed(**{name: "x"}))


def test_another_name_of_the_system_message_is_not_passed_over(tmp_path):
    """OpenHermes has it, null in most rows."""
    assert read(tmp_path / "rows.jsonl", {**OPENAI, "system_prompt": None}) == RECORDS
    with pytest.raises(UserError, match=r"'system_prompt' has another name here: .*system=system_prompt"):
        read(tmp_path / "rows.jsonl", {**SYSTEM_ROW, "system_prompt": "x"})


def test_a_system_message_that_stands_twice_is_one(tmp_path):
    assert read(tmp_path / "rows.jsonl", {**OPENAI, "system": "Be brief."}) == RECORDS


KINDS = {
    "messages": OPENAI["messages"],
    "conversations": SHAREGPT["conversations"],
    "instruction": "a",
    "question": "b",
}


@pytest.mark.parametrize("pair", [*itertools.combinations(KINDS, 2)], ids="+".join)
def test_a_row_of_two_kinds_is_refused(tmp_path, pair):
    row = {"output": "x", "answer": "#### 1", **{name: KINDS[name] for name in pair}}
    with pytest.raises(UserError) as caught:
        read(tmp_path / "rows.jsonl", row)
    assert f"rows.jsonl:1: the row holds {pair[0]!r} and {pair[1]!r}" in str(caught.value)
    for absent in (None, "", []):
        assert read(tmp_path / "rows.jsonl", {**row, pair[1]: absent})


def test_columns_without_a_meaning_here_are_passed_over(tmp_path):
    extra = {**dict.fromkeys(("source", "category", "prompt", "text", "context"), "x"), "id": 3, "score": 1.5}
    plain = {"instruction": "a", "output": "b", "answer": "c"}
    assert read(tmp_path / "rows.jsonl", {**OPENAI, **extra}) == RECORDS
    assert read(tmp_path / "rows.jsonl", {**plain, **extra}) == [Record("a", "", "b", "c")]
    assert read(tmp_path / "rows.jsonl", {**OPENAI, "answer": 7, "references": [7]}) == RECORDS


def test_a_chat_that_is_scored_has_the_answer_and_references_of_its_row(tmp_path):
    golds = {"answer": "two", "references": ["2", "two"]}
    row = {"messages": OPENAI["messages"][:3], **golds}
    (found,) = read(tmp_path / "rows.jsonl", row, scored=True)
    assert found == replace(RECORDS[0], answer="two", references=("2", "two"))
    with pytest.raises(UserError, match="'answer' stands beside a chat of 2 answers: expected one answer"):
        read(tmp_path / "rows.jsonl", {**OPENAI, **golds}, scored=True)


def test_a_prompt_file_is_read_by_the_same_rules():
    assert read_question(json.dumps(SYSTEM_ROW), "p:1") == Record(
        "hi\n\nthere", "", "", "", (Message("system", SYSTEM_ROW["system"]), Message("user", "hi\n\nthere"))
    )
    assert read_question('{"instruction": "a", "input": null}', "p:1") == Record("a", "", "", "")
    assert read_question('{"question": "a", "answer": "7"}', "p:1") == Record("a", "", "", "")
    asked = json.dumps({"messages": OPENAI["messages"][:4]})
    assert read_question(asked, "p:1").messages == RECORDS[1].messages
    for line, message in {
        "[1]": "p:1: expected an object, found list",
        '{"input": "x"}': "p:1: field 'instruction' holds nothing, expected text: the row has 'input'",
        '{"instruction": "x", "images": ["y"]}': "p:1: field 'images' is not supported",
        '{"instruction": "x", "instruction": "y"}': "p:1: .*the name 'instruction' occurs twice",
    }.items():
        with pytest.raises(UserError, match=message):
            read_question(line, "p:1")


def test_a_question_ends_with_the_user():
    assert read_chat(chat(("user", "x")), "here", last="user") == (Message("user", "x"),)
    with pytest.raises(UserError, match="here: the last message is of the assistant, expected"):
        read_chat(OPENAI, "here", last="user")
    with pytest.raises(UserError, match="here: expected a field 'messages' or 'conversations'"):
        read_chat({"instruction": "x"}, "here")


def test_the_turns_of_a_chat_are_held_out_together():
    """The prompt of a later turn holds the answer of an earlier one."""
    chats = []
    for i in range(30):
        first, second = RECORDS
        ask = Message("user", f"{i} + 1?")
        chats.append([first_of(first, ask), second_of(second, ask)])
    records = [record for turns in chats for record in turns]
    train, dev = map(list, holdout(records, 0.2, seed=1))
    assert (len(train), len(dev)) == (48, 12)
    assert {record.messages[1] for record in train}.isdisjoint(record.messages[1] for record in dev)
    with pytest.raises(UserError, match="too few"):
        holdout(records[:2], 0.5, seed=0)


def test_the_first_rows_are_whole_chats():
    ask = Message("user", "1 + 1?")
    records = [*RECORDS, *(make(r, ask) for make, r in zip((first_of, second_of), RECORDS, strict=True))]
    assert first_rows(records, 1) == records[:2]
    assert first_rows(records, 0) == first_rows(records, 9) == records


def first_of(record, ask):
    return Record(ask.content, "", record.output, record.answer, (SYSTEM, ask))


def second_of(record, ask):
    return Record(record.instruction, "", record.output, record.answer, (SYSTEM, ask, SAY, MORE))


def test_a_fingerprint_sees_the_chat_and_its_template_and_plain_rows_keep_theirs():
    plain = [Record("a", "", "b", "c")]
    row = {"answer": "c", "input": "", "instruction": "a", "output": "b"}
    assert fingerprint(plain) == hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
    other = Record("And 1?", "", "3", "3", (ASK, SAY, MORE))
    prints = {
        *(fingerprint(records) for records in (plain, RECORDS, RECORDS[1:], [other])),
        fingerprint(RECORDS, "template"),
    }
    assert len(prints) == 5


def test_the_last_answer_alone_may_be_learned(tmp_path):
    """Of a chat, of a plain row with a history, and of a row that switches its last answer off."""
    unlearned = json.loads(json.dumps(OPENAI))
    unlearned["messages"][-1]["weight"] = 0
    plain = {"instruction": "And 1?", "output": "3", "history": [["1 + 1?", " 2 "]]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in (OPENAI, unlearned, plain, MATHS)))
    data = DataSection(train=str(path), dev=f"dev={path}", test=f"test={path}", train_on="last")
    splits = run_sources(data)
    for split in ("train", "dev"):
        (source,) = splits[split]
        found = read_records(source)
        assert found == list(Records((source,)))
        assert [record.output for record in found] == ["3", " 2 ", "3", "The answer is 2."]
        assert found[0] == RECORDS[1]
        assert [len(record.messages) for record in found] == [4, 2, 3, 0]
    every = run_sources(replace(data, train_on="all"))
    assert len(read_records(every["train"][0])) == 6
    assert splits["test"] == every["test"]
    with pytest.raises(UserError, match=r"data\.train_on is 'first': expected one of all, last"):
        DataSection(train_on="first")
