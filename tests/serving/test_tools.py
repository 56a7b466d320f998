"""Calls of tools in replies: a table of texts for each family, whole and in pieces."""

import json

import numpy as np
import pytest

from milora_jax.data.tokens import load_tokenizer
from milora_jax.serving.limits import Limits
from milora_jax.serving.structured import Grammars
from milora_jax.serving.tool_fields import Tool
from milora_jax.serving.tools import HERMES, LLAMA3, MISTRAL, CallParser, call_grammar, family_of
from milora_jax.tiny import MODEL_DIR

NAMES = frozenset({"f", "get_weather"})


def parsed(family, text, one_call=False, size=None):
    """Content and calls of a reply that comes in pieces."""
    parser, content, calls = CallParser(family, NAMES, one_call), "", []
    size = size or len(text)
    for at in range(0, len(text), size):
        more, made = parser.feed(text[at : at + size], at + size >= len(text))
        content += more
        calls += [(call.name, json.loads(call.arguments)) for call in made]
    return content, calls


F = ("f", {"a": 1})
W = ("get_weather", {})
TABLE = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F]),
    (
        HERMES,
        'Hi.\n<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call> ',
        "Hi.\n",
        [F, W],
    ),
    (
        HERMES,
        '<tool_call>{"name":"f","arguments":{"c": "</tool_call>"}}</tool_call>',
        "",
        [("f", {"c": "</tool_call>"})],
    ),
    (HERMES, '<tool_call>{"name":"f","arguments":{"a":1}}', "", [F]),
    (HERMES, '\n<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>bye', "bye", [F]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [F]),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name":"f","arguments":{"a":1}}, {"name":"get_weather","arguments":{}}]',
        "",
        [F, W],
    ),
    (MISTRAL, 'Hi. [TOOL_CALLS]f{"a": 1}', "Hi. ", [F]),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{}', "", [F, W]),
    (MISTRAL, '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", [F]),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA3, '{"name":"f","parameters":{"a":1}}; {"name":"get_weather","parameters":{}}', "", [F, W]),
]

MALFORMED = [
    (HERMES, '<tool_call>{"name":"g","arguments":{}}</tool_call>'),
    (HERMES, '<tool_call>{"name":"f","arguments":[]}</tool_call>'),
    (HERMES, '<tool_call>{"name":"f","arguments":{"a":NaN}}</tool_call>'),
    (HERMES, "<tool_call>{bad}</tool_call> and so on"),
    (HERMES, '<tool_call>{"name":"f","arguments":{"a":'),
    (HERMES, "a < b <tool"),
    (HERMES, '<tool_call>{"name":"f","arguments":' + '{"a":' * 3000),
    (HERMES, "  plain  "),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, '[TOOL_CALLS][{"name":"f"'),
    (MISTRAL, '[TOOL_CALLS][{"name":"f","arguments":{}}, {"name":"zz","arguments":{}}]'),
    (MISTRAL, "text [TOOL_CALLS] nothing here"),
    (LLAMA3, '{"a": 1}'),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}} trailing'),
    (LLAMA3, 'Hello {"name": "f", "parameters": {}}'),
    (LLAMA3, "{oops"),
    (LLAMA3, "<|python_tag|>print(1)"),
]


@pytest.mark.parametrize("size", [None, 1, 3, 7])
def test_calls_are_taken_out_of_a_reply(size):
    for family, text, content, calls in TABLE:
        assert parsed(family, text, size=size) == (content, calls), text


@pytest.mark.parametrize("size", [None, 1, 5])
def test_what_is_no_call_stays_content(size):
    for family, text in MALFORMED:
        assert parsed(family, text, size=size) == (text, []), text


def test_one_call_is_enough_where_no_more_are_wanted():
    for family, text, _, calls in TABLE:
        if len(calls) > 1:
            assert parsed(family, text, one_call=True, size=4)[1] == calls[:1]


def test_the_family_is_read_off_the_template():
    assert family_of("{{ '<tool_call>' }}") is HERMES
    assert family_of('{{ "[TOOL_CALLS] [" }}') is MISTRAL
    assert (
        family_of("""{{ '<|start_header_id|>' }}{{ '{"name": function name, "parameters": ...}' }}""")
        is LLAMA3
    )
    assert family_of("{{ messages }}") is None


TEMPLATES = (
    "{{ '<tool_call>' }}",
    '{{ "[TOOL_CALLS] [" }}',
    '{{ "[TOOL_CALLS]" }}{{ name }}[ARGS]',
    """{{ '<|start_header_id|>' }}{{ '{"name": ..., "parameters": ...}' }}""",
)


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize(
    "tokens", [{}, {"<tool_call>": 5, "</tool_call>": 6, "[TOOL_CALLS]": 7, "[ARGS]": 8}]
)
def test_what_a_grammar_allows_can_be_parsed(source, one_call, tokens):
    """Random texts of the grammar of a family, on the embedded model's tokenizer and one with its markers."""
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(str(MODEL_DIR))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in tokens])
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in tokens}
    parameters = {
        "type": "object",
        "properties": {"a": {"enum": [1, "x", "</tool_call>"]}},
        "required": ["a"],
    }
    parameters["additionalProperties"] = False
    tools = [
        Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": parameters}}),
        Tool.model_validate({"type": "function", "function": {"name": "get_weather"}}),
    ]
    family = family_of(source)
    assert family is not None
    grammars = Grammars(tokenizer, 1024, [2], Limits())
    constraint = grammars.compile(call_grammar(family, source, tools, one_call, ids.get).source)
    assert not isinstance(constraint, str), constraint
    rng, counts = np.random.default_rng(0), set()
    for _ in range(10):
        each, chosen = constraint.copy(), []
        while True:
            allowed = np.flatnonzero(np.unpackbits(each.mask().view(np.uint8), bitorder="little"))
            token = int(rng.choice(allowed))
            if token == 2:
                break
            each.accept(token)
            chosen.append(token)
        content, calls = parsed(family, tokenizer.decode(chosen), size=3)
        assert not content
        assert calls
        assert all(set(arguments) == ({"a"} if name == "f" else set()) for name, arguments in calls)
        counts.add(len(calls))
    assert counts == {1} if one_call or family is LLAMA3 else max(counts) > 1
