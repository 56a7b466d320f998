"""Chats in files: both forms, a record for each turn, and every way a row can be wrong."""

import hashlib
import json
from dataclasses import asdict

import pytest

from milora_jax.data.chat import Message
from milora_jax.data.conversations import read_chat
from milora_jax.data.records import Record, Source, fingerprint, first_rows, holdout, read_records
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


GOOD = [("user", "x"), ("assistant", "y")]
BROKEN = {
    "no list": ({"messages": "x"}, "field 'messages' holds str, expected a list of messages"),
    "no object": ({"messages": ["x"]}, "message 1: expected an object, found str"),
    "no role": ({"messages": [{"content": "x"}]}, "message 1: field 'role' holds nothing"),
    "other form": ({"conversations": OPENAI["messages"]}, "message 1: field 'from' holds nothing"),
    "other role": (chat(("tool", "x")), "role is 'tool', expected one of system, user, assistant"),
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
    "two systems": (chat(("system", "x"), *GOOD, system="y"), "field 'system' stands beside a system"),
    "no text": (chat(*GOOD, system=3), "field 'system' holds int, expected text"),
    "tools": (chat(*GOOD, tools=[{}]), "the row has a field 'tools': expected a chat without tools"),
    "call": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "message 1 has a field 'tool_calls': expected a chat without tools",
    ),
    "both": (chat(*GOOD, instruction="x"), "the row holds 'instruction' and 'messages'"),
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
    train, dev = holdout(records, 0.2, seed=1)
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
