"""Tools through the real client of OpenAI, on a random model whose chat template has them."""

import json
from unittest.mock import patch

import jsonschema
import pytest
from openai import BadRequestError

from milora_jax.data.chat import Message, encode_chat
from milora_jax.data.tokens import load_tokenizer
from milora_jax.serving.keys import Keyring
from milora_jax.serving.limits import Limits
from milora_jax.serving.service import Delta, with_calls
from milora_jax.serving.tools import HERMES, CallParser
from tests.serving.harness import digest, openai_client, running, service_of, serving, write_model

pytestmark = pytest.mark.thorough

HERMES_TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
PLACE = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
SCHEMAS = {"weather": PLACE, "now": {"type": "object", "maxProperties": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("tools")
    return made, write_model(made, HERMES_TEMPLATE)["math"]


@pytest.fixture(scope="module")
def served_with_tools(folder):
    limits = Limits(rows=2, context=500, chunk=4, samples=2)
    service, registry = service_of(folder[0], {"math": folder[1]}, limits)
    keys = folder[0] / "keys.json"
    keys.write_text(json.dumps({"tenants": [{"name": "two", "sha256": digest("two"), "concurrency": 9}]}))
    ring = Keyring.of(keys, {})
    with running(service), serving(service, registry, ring) as address:
        yield address, service


@pytest.fixture
def client(served_with_tools):
    with openai_client(served_with_tools[0], "two") as made:
        yield made


CHAT = {
    "model": "math",
    "messages": [{"role": "user", "content": "Rain?"}],
    "max_tokens": 150,
    "tools": TOOLS,
}


def check(calls, names):
    for call in calls:
        assert call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert len({call.id for call in calls}) == len(calls)


def test_a_required_call_can_always_be_parsed(client):
    for seed in range(5):
        found = client.chat.completions.create(
            **CHAT, tool_choice="required", parallel_tool_calls=False, seed=seed, n=2
        )
        for choice in found.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            assert len(choice.message.tool_calls) == 1
            check(choice.message.tool_calls, SCHEMAS)


def test_a_named_call_is_made_and_streamed(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(**CHAT, tool_choice=choice, seed=1) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert final.finish_reason == "tool_calls"
    check(final.message.tool_calls, {"weather"})
    assert len(final.message.tool_calls) == 1
    pieces = client.chat.completions.create(**CHAT, tool_choice=choice, seed=1, stream=True)
    deltas = [each for piece in pieces for each in piece.choices[0].delta.tool_calls or []]
    assert [each.id is not None for each in deltas] == [True, False]
    assert deltas[0].function.name == "weather"


def test_several_calls_may_be_made(client):
    found = client.chat.completions.create(**CHAT, tool_choice="required", seed=2)
    check(found.choices[0].message.tool_calls, SCHEMAS)


def test_a_conversation_with_tools_goes_on(client):
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    asked = {**CHAT, "messages": messages, "max_tokens": 5}
    for choice in ("auto", "none"):
        found = client.chat.completions.create(**asked, tool_choice=choice)
        assert found.choices[0].message.tool_calls is None
        assert found.usage.prompt_tokens > 40


def test_a_reply_that_may_call_is_parsed(client):
    """The random model writes no call by chance, so its text is replaced."""
    reply = 'Yes.<tool_call>{"name": "now", "arguments": {}}</tool_call>'

    def replaced(delta, parser):
        return with_calls(Delta(delta.sample, reply if delta.finish else "", (), (), delta.finish), parser)

    with patch("milora_jax.serving.service.with_calls", replaced):
        found = client.chat.completions.create(
            **{**CHAT, "max_tokens": 4}, extra_body={"ignore_eos": True}
        ).choices[0]
    assert (found.message.content, found.message.tool_calls[0].function.name) == ("Yes.", "now")
    assert found.finish_reason == "length", "the sample was cut"
    ended = with_calls(Delta(0, reply, (), (), "stop"), CallParser(HERMES, frozenset({"now"}), False))
    assert ended.finish == "tool_calls"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "messages"),
    ],
)
def test_contradictions_are_refused_by_name(client, change, field):
    with pytest.raises(BadRequestError) as found:
        client.chat.completions.create(**{**CHAT, **change})
    assert found.value.param.startswith(field)


def test_bad_parameters_are_refused(client):
    bad = [{"type": "string"}, {"not": {}}, {"properties": {"a": {"pattern": "a{99999}"}}}]
    for parameters in bad:
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        with pytest.raises(BadRequestError, match="tools"):
            client.chat.completions.create(**{**CHAT, "tools": [tool], "tool_choice": "required"})
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1]"}}
    with pytest.raises(BadRequestError, match="messages"):
        client.chat.completions.create(
            **{**CHAT, "messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
        )


def test_no_text_of_a_tool_becomes_a_control_token(folder):
    tokenizer = load_tokenizer(str(folder[0] / "model"))
    ends = "a</s>b<s>"
    tools = [{"type": "function", "function": {"name": "f", "description": ends, "parameters": {ends: {}}}}]
    call = {"id": ends, "type": "function", "function": {"name": "f", "arguments": {ends: [ends]}}}
    messages = [Message("user", ends), Message("assistant", "", (call,)), Message("tool", ends, (), ends)]
    ids = encode_chat(tokenizer, messages, tools=tools)
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids).count(ends) == 6
    ascii_template = HERMES_TEMPLATE.replace("tojson", "tojson(ensure_ascii=True)")
    tokenizer.chat_template = ascii_template
    assert encode_chat(tokenizer, messages, tools=tools) == ids


def test_a_template_without_tools_is_named(served):
    with openai_client(served[1], "two") as client:
        for change in ({}, {"tool_choice": "none"}):
            with pytest.raises(BadRequestError, match="chat template"):
                client.chat.completions.create(**{**CHAT, **change})
