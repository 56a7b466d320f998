"""Chats with tools in rows: three spellings, one record; the template's tokens; every mistake by name."""

import json
from dataclasses import replace

import pytest

from milora_jax.data.chat import Message, encode_chat
from milora_jax.data.prompts import shown_prompt
from milora_jax.data.records import Record, by_row, fingerprint, read_question, read_records
from milora_jax.data.sources import Source
from milora_jax.data.tokens import encode_conversation, encode_example, encode_question
from milora_jax.errors import UserError
from milora_jax.prompt_format import PromptFormat
from tests.data.chats import CHATML, HERMES, chat_tokenizer

FORMAT = PromptFormat("chat")
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
NOW = {"type": "function", "function": {"name": "now"}}
OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}
CALL = {"type": "function", "function": OSLO}
ASK, SAY = {"role": "user", "content": "Is it cold in Oslo?"}, {"role": "assistant", "content": "Yes."}
RESULT = {"role": "tool", "content": "-3"}
PLAIN_CHAT = "7ce2a841e1719bc466252bbb3d97b6a2574805bd451370cb175f2cf4b1217990"


def called(calls, **more):
    return {"role": "assistant", "tool_calls": calls, **more}


def row_of(*messages, **more):
    return {"tools": [WEATHER, NOW], "messages": list(messages), **more}


ROW = row_of(ASK, called([CALL]), RESULT, SAY)
AS_TEXT = {
    "tools": json.dumps([WEATHER, NOW]),
    "messages": [
        ASK,
        called([{**CALL, "function": {**OSLO, "arguments": '{"city": "Oslo"}'}}], content=None),
        RESULT,
        SAY,
    ],
}
SHAREGPT = {
    "tools": json.dumps([WEATHER, NOW]),
    "conversations": [
        {"from": "human", "value": ASK["content"]},
        {"from": "function_call", "value": json.dumps(OSLO)},
        {"from": "observation", "value": "-3"},
        {"from": "gpt", "value": "Yes."},
    ],
}
ASKED = (Message("user", ASK["content"]),)
RECORDS = [
    Record(ASK["content"], "", "", "", ASKED, tools=(WEATHER, NOW), calls=(CALL,)),
    Record(
        *("-3", "", "Yes.", "Yes."),
        (*ASKED, Message("assistant", "", (CALL,)), Message("tool", "-3")),
        tools=(WEATHER, NOW),
    ),
]


def read(path, *rows, **more):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(Source("rows", str(path)), **more)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("transformers")
    return chat_tokenizer(tmp_path_factory.mktemp("tools"), HERMES)


@pytest.fixture(scope="module")
def ends(tokenizer):
    return [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("row", [ROW, AS_TEXT, SHAREGPT], ids=["openai", "json text", "sharegpt"])
def test_a_call_and_what_follows_its_result_are_a_record_each(tmp_path, row):
    found = read(tmp_path / "rows.jsonl", row)
    assert found == RECORDS
    assert list(by_row(found)) == [found], "the turns of a chat stay together"
    assert len({*found, *RECORDS}) == 2, "records are hashable"


def test_parallel_calls_their_results_and_their_identities(tmp_path):
    calls = [{"id": "a", **CALL}, {"id": "b", "type": "function", "function": {"name": "now"}}]
    results = [{**RESULT, "tool_call_id": "a", "name": "weather"}, {"role": "tool", "content": ""}]
    first, last = read(tmp_path / "rows.jsonl", row_of(ASK, called(calls, content="Wait."), *results, SAY))
    assert first.output == "Wait."
    assert [call["id"] for call in first.calls] == ["a", "b"]
    assert first.calls[1]["function"] == {"name": "now", "arguments": {}}
    assert last.messages[2:] == (
        Message("tool", "-3", tool_call_id="a", name="weather"),
        Message("tool", ""),
    )


def test_a_call_of_weight_0_is_history(tmp_path):
    row = row_of(ASK, called([CALL], weight=0), RESULT, SAY)
    assert read(tmp_path / "rows.jsonl", row) == RECORDS[1:]
    (found,) = read(tmp_path / "rows.jsonl", {**row, "answer": "Yes"}, scored=True)
    assert found == replace(RECORDS[1], answer="Yes")


def test_an_instruction_may_have_tools(tmp_path):
    row = {"instruction": "Is it cold?", "output": "No.", "tools": [WEATHER]}
    expected = Record("Is it cold?", "", "No.", "No.", (Message("user", "Is it cold?"),), tools=(WEATHER,))
    assert read(tmp_path / "rows.jsonl", row) == [expected]


@pytest.mark.parametrize("row", [row_of(ASK), row_of(ASK, called([CALL]), RESULT)], ids=["user", "tool"])
def test_a_question_has_the_tools_of_its_row(tmp_path, row, tokenizer):
    found = read_question(json.dumps(row), "p:1")
    assert (found.tools, found.messages[-1].role) == ((WEATHER, NOW), row["messages"][-1]["role"])
    assert read(tmp_path / "rows.jsonl", row, scored=True) == [found]
    expected = tokenizer.apply_chat_template(
        row["messages"], tools=row["tools"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert encode_question(tokenizer, found, FORMAT).ids == expected
    assert '"name": "weather"' in shown_prompt(tokenizer, found, FORMAT)


def test_tokens_are_those_of_the_template_and_results_are_not_learned(tokenizer, ends):
    whole = tokenizer.apply_chat_template(
        ROW["messages"], tools=ROW["tools"], tokenize=True, return_dict=False
    )
    call, last = (encode_example(tokenizer, record, ends, 2000, FORMAT) for record in RECORDS)
    for example in (call, last):
        assert example.tokens.tolist() == whole[: len(example.tokens)]
    learned = [tokenizer.decode(each.tokens[each.prompt_length :]) for each in (call, last)]
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>'
    assert learned == [text, "Yes.<|im_end|>"]


def test_a_conversation_of_one_route_holds_the_call_and_the_answer(tokenizer, ends):
    scope = PromptFormat("chat", route_on="first_turn")
    example, turns = encode_conversation(tokenizer, RECORDS, ends, 2000, scope)
    assert turns == 2
    alone = [encode_example(tokenizer, record, ends, 2000, FORMAT) for record in RECORDS]
    assert example.tokens.tolist() == alone[1].tokens.tolist()
    assert [(begin, end) for begin, end in example.answers] == [
        (each.prompt_length, len(each.tokens)) for each in alone
    ]
    head = tokenizer.decode(example.tokens[: example.route_tokens])
    assert "weather" in head
    assert head.endswith("Is it cold in Oslo?<|im_end|>\n")


def test_a_special_token_in_tools_calls_and_results_stays_text(tokenizer, ends):
    evil = "<|im_end|>"
    tool, call = (
        {"name": f"w{evil}"},
        {"type": "function", "function": {"name": "f", "arguments": {"x": evil}}},
    )
    messages = (*ASKED, Message("assistant", "", (call,)), Message("tool", evil))
    record = Record("", "", evil, evil, messages, tools=(tool,))
    plain = json.loads(json.dumps(messages_of(messages)).replace(evil, "x"))
    example = encode_example(tokenizer, record, ends, 2000, FORMAT)
    expected = tokenizer.apply_chat_template(
        [*plain, SAY], tools=[{"name": "w"}], tokenize=True, return_dict=False
    )
    assert example.tokens.tolist().count(ends[0]) == expected.count(ends[0])


def messages_of(messages):
    return [{"role": m.role, "content": m.content, "tool_calls": list(m.tool_calls)} for m in messages]


def test_the_prompt_is_the_one_that_a_server_makes(tokenizer):
    from milora_jax.serving.limits import Limits
    from milora_jax.serving.requests import ChatRequest

    body = {
        "model": "m",
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            ASK,
            called([{"id": "a", **CALL, "function": {**OSLO, "arguments": '{"city": "Oslo"}'}}]),
            {**RESULT, "tool_call_id": "a"},
        ],
    }
    request = ChatRequest.model_validate(body)
    limits = Limits()
    served = encode_chat(tokenizer, request.chat(limits), tools=request.tools_for_template(limits))
    assert encode_question(tokenizer, read_question(json.dumps(body), "p:1"), FORMAT).ids == served


MISTAKES = {
    "tools of text": ({**ROW, "tools": "weather"}, "field 'tools': no JSON"),
    "tools of a number": ({**ROW, "tools": "3"}, "field 'tools' holds int, expected a list of tools"),
    "tool without a name": ({**ROW, "tools": [{"type": "function"}]}, "'tools': tool 1: it has no name"),
    "two of a name": ({**ROW, "tools": [WEATHER, WEATHER]}, "two tools are named 'weather'"),
    "no call": (row_of(ASK, called("x"), RESULT, SAY), "message 2: field 'tool_calls': no JSON"),
    "kind": (
        row_of(ASK, called([{**CALL, "type": "web"}]), RESULT, SAY),
        "type is 'web', expected 'function'",
    ),
    "arguments": (
        row_of(ASK, called([{"name": "now", "arguments": "[1]"}]), RESULT, SAY),
        "message 2: field 'tool_calls': call 1: arguments are list, expected an object",
    ),
    "arguments of a list": (
        row_of(ASK, called([{"name": "now", "arguments": []}]), RESULT, SAY),
        "call 1: arguments are list, expected an object",
    ),
    "no result": (
        row_of(ASK, called([CALL]), SAY),
        "message 3 is of the assistant, expected one of the tool",
    ),
    "a result too early": (
        row_of(ASK, RESULT, SAY),
        "message 2 is of the tool, expected one of the assistant",
    ),
    "a user's call": (row_of({**ASK, "tool_calls": [CALL]}, SAY), "message 1: field 'tool_calls' is not"),
    "a user's name": (row_of({**ASK, "name": "Ann"}, SAY), "message 1: field 'name' is not supported"),
    "other identity": (
        row_of(ASK, called([{"id": "a", **CALL}]), {**RESULT, "tool_call_id": "b"}, SAY),
        "message 3: tool_call_id 'b' is of no call before it",
    ),
    "the older names": (
        row_of(ASK, {**SAY, "function_call": OSLO}),
        "field 'function_call' is not supported",
    ),
    "ends with a result": (row_of(ASK, called([CALL]), RESULT), "the last message is of the tool"),
    "sharegpt's call": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(x)"}]},
        "message 2: no JSON",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(tmp_path, name):
    row, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path / "rows.jsonl", ROW, row)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert message in str(caught.value)


def test_calls_are_not_scored(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:1: message 2 calls a tool, and calls are not scored"):
        read(tmp_path / "rows.jsonl", ROW, scored=True)


WITHOUT_CALLS = HERMES.replace("message.tool_calls or []", "[]")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML, "rows:7: the chat template of this model has no place for tools"),
        (WITHOUT_CALLS, "rows:7: the chat template does not write the call of 'weather'"),
    ],
    ids=["no tools", "no calls"],
)
def test_a_template_that_would_lose_them_is_refused(tmp_path, template, message, ends):
    written = chat_tokenizer(tmp_path, template)
    with pytest.raises(UserError, match=message):
        encode_example(written, replace(RECORDS[0], where="rows:7"), ends, 2000, FORMAT)
    alpaca = PromptFormat("alpaca")
    with pytest.raises(UserError, match=r"data\.template is 'alpaca': expected data\.template=chat"):
        encode_example(written, RECORDS[1], ends, 2000, alpaca)


def test_fingerprints_see_tools_and_calls_and_other_chats_keep_theirs():
    first, last = RECORDS
    other = replace(first, calls=({**CALL, "function": {**OSLO, "arguments": {"city": "Rome"}}},))
    prints = [fingerprint([each]) for each in (first, other, replace(first, tools=()), last)]
    assert len({*prints}) == 4
    plain = Record("a", "", "b", "b", (Message("user", "a"),))
    # As it was before messages had a name and records had tools: runs on chats can be resumed.
    assert fingerprint([plain]) == PLAIN_CHAT
