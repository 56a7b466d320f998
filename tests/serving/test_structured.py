"""Structured output: every answer that ends fits its grammar; what cannot be served is refused by name."""

import asyncio
import json
import re

import jsonschema
import numpy as np
import pytest
from openai import BadRequestError

from milora_jax.base.hf_config import read_model_config
from milora_jax.data.tokens import load_tokenizer
from milora_jax.generation.constraint import ConstraintError
from milora_jax.serving.api_errors import APIError
from milora_jax.serving.format_fields import FormatFields
from milora_jax.serving.limits import Limits
from milora_jax.serving.structured import Grammars, json_grammar
from milora_jax.tiny import MODEL_DIR
from tests.serving.harness import openai_client
from tests.serving.schemas import random_schema

LIMITS = Limits(grammar_seconds=2.0)


@pytest.fixture(scope="module")
def grammars():
    """Of the embedded model, whose vocabulary is longer than its tokenizer's."""
    config = read_model_config(MODEL_DIR)
    made = Grammars(load_tokenizer(str(MODEL_DIR)), config.vocab_size, config.eos_ids, LIMITS)
    made.tokenizer, made.config = load_tokenizer(str(MODEL_DIR)), config
    return made


def written(grammars, constraint, rng, longest=400):
    """A text of random allowed tokens, and whether it ended."""
    tokens = []
    for _ in range(longest):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        assert allowed.max() < len(grammars.tokenizer), "no token that only pads the vocabulary"
        token = int(rng.choice(allowed))
        if token in grammars.config.eos_ids:
            return grammars.tokenizer.decode(tokens), True
        constraint.accept(token)
        tokens.append(token)
    return grammars.tokenizer.decode(tokens), False


def answers(grammars, count, seed):
    """Of random texts in random schemas: how many ended; each that did is valid."""
    rng, ended = np.random.default_rng(seed), 0
    for _ in range(count):
        schema = random_schema(rng)
        constraint = grammars.compile(json_grammar(schema, "x").source)
        assert not isinstance(constraint, str), (schema, constraint)
        text, whole = written(grammars, constraint.copy(), rng)
        if whole:
            ended += 1
            jsonschema.validate(json.loads(text), schema)
    return ended


def test_texts_of_random_schemas_are_valid(grammars):
    assert answers(grammars, 40, 0) > 30


@pytest.mark.thorough
def test_texts_of_five_hundred_random_schemas_are_valid(grammars):
    assert answers(grammars, 500, 1) > 400


@pytest.mark.parametrize(
    ("fields", "matches"),
    [
        ({"guided_regex": "[ab]{3}c"}, "[ab]{3}c"),
        ({"guided_choice": ["yes", 'n"o', "a|b"]}, r'yes|n"o|a\|b'),
        ({"guided_grammar": 'start: "x" y\ny: /[0-9]{2}/'}, "x[0-9]{2}"),
        ({"guided_grammar": 'root ::= "a" [0-9]'}, "a[0-9]"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_json": '{"type": "null"}'}, "null"),
        ({"structured_outputs": {"choice": ["p", "q"]}}, "p|q"),
        ({"structured_outputs": {"json": {"enum": [7]}}}, "7"),
        ({"structured_outputs": {"regex": "z+!"}}, "z+!"),
        ({"guided_regex": "\u4e2d|\U0001f600"}, "\u4e2d|\U0001f600"),
    ],
)
def test_every_way_to_ask(grammars, fields, matches):
    constraint = asyncio.run(grammars.constraint(FormatFields(**fields).format_grammar))
    rng = np.random.default_rng(0)
    for _ in range(5):
        text, whole = written(grammars, constraint.copy(), rng, longest=2000)
        assert whole
        assert re.fullmatch(matches, text), text


BAD = {
    "guided_regex": ["(", "(?=a)b", "a{999999}", r"[^\s\S]", "a" * 70000, "(" * 3000 + ")" * 3000],
    "guided_json": [
        {"not": {"type": "string"}},
        {"type": "foo"},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"$ref": "http://example.com/x.json"},
        {"$ref": "#"},
        {"enum": []},
        {"type": "string", "pattern": "^a{1000000}$"},
        "[1",
        "[1]",
        "[" * 3000,
        {"enum": ["x" * 70000]},
        {
            "allOf": [
                {"anyOf": [{"type": "string", "pattern": f"a{i}{j}.*b"} for i in range(10)]}
                for j in range(10)
            ]
        },
    ],
    "guided_grammar": ["nothing", "start: b", "start: @x", "start: A\nA: B\nB: A", "::="],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_what_cannot_be_served_is_refused_by_its_field(grammars, field, value):
    with pytest.raises(APIError) as found:
        asyncio.run(grammars.constraint(FormatFields(**{field: value}).format_grammar))
    assert (found.value.status, found.value.body["error"]["param"]) == (400, field)
    assert len(found.value.body["error"]["message"]) < 500


@pytest.mark.thorough
def test_a_grammar_that_takes_for_ever_is_cut_and_the_next_is_served(grammars):
    parts = " & ".join(f"/(a{{{n}}})*b/" for n in (7, 11, 13, 17, 19, 23, 29))
    with pytest.raises(APIError, match="--grammar-seconds"):
        asyncio.run(grammars.constraint(FormatFields(guided_grammar=f"start: A\nA: {parts}").format_grammar))
    assert asyncio.run(grammars.constraint(FormatFields(guided_regex="ab").format_grammar)) is not None


def test_a_grammar_that_becomes_too_complex_fails_alone(grammars):
    constraint = grammars.compile(json_grammar({"type": "array"}, "x").source).copy()
    other = asyncio.run(
        grammars.constraint(FormatFields(guided_regex="(.*[ab].{18})(.*[cd].{17})").format_grammar)
    )
    rng = np.random.default_rng(0)

    def write_many():
        for _ in range(100):
            written(grammars, other.copy(), rng, longest=500)

    with pytest.raises(ConstraintError, match="too many states"):
        write_many()
    constraint.mask()


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "a", "guided_choice": ["x"]},
        {"response_format": {"type": "json_object"}, "guided_json": {}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
    ],
)
def test_contradictions_are_refused(fields):
    with pytest.raises(APIError):
        FormatFields(**fields).format_grammar(LIMITS)


@pytest.fixture
def client(served):
    with openai_client(served[1], "two") as made:
        yield made


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def test_the_client_of_openai_gets_what_it_asked_for(client):
    chat = {"model": "math", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    whole = client.chat.completions.create(**chat, response_format=form, n=2)
    for choice in whole.choices:
        assert choice.finish_reason in ("stop", "length")
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    pieces = client.chat.completions.create(**chat, stream=True, extra_body={"guided_regex": "[ab]{5}c"})
    text = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert re.fullmatch("[ab]{5}c", text)
    done = client.completions.create(
        model="base", prompt="x", max_tokens=20, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert done.choices[0].text in ("yes", "no")
    with pytest.raises(BadRequestError, match="guided_regex"):
        client.completions.create(model="base", prompt="x", extra_body={"guided_regex": "("})
    with pytest.raises(BadRequestError, match="ignore_eos"):
        client.completions.create(
            model="base", prompt="x", extra_body={"guided_regex": "a", "ignore_eos": True}
        )


@pytest.mark.thorough
def test_responses_take_a_format_and_repeat_it(client):
    asked = {"model": "math", "input": "x", "max_output_tokens": 60}
    form = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    found = client.responses.create(**asked, text={"format": form})
    assert found.text.format.type == "json_schema"
    assert found.text.format.schema_ == SCHEMA
    assert found.usage.input_tokens_details.cached_tokens == 0
    assert found.status in ("completed", "incomplete")
    if found.status == "completed":
        jsonschema.validate(json.loads(found.output_text), SCHEMA)
    *_, last = client.responses.create(**asked, text={"format": {"type": "json_object"}}, stream=True)
    assert last.response.text.format.type == "json_object"
    assert last.response.output_text.lstrip().startswith("{")


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "name": "place"},
        {"type": "json_schema", "schema": {"type": "object"}},
        {"type": "text", "schema": {"type": "object"}},
        {"type": "json_schema", "name": "place", "schema": {"type": "nothing"}},
        {"type": "xml"},
    ],
)
def test_a_format_of_a_response_is_refused_by_its_name(client, form):
    with pytest.raises(BadRequestError) as error:
        client.responses.create(model="math", input="x", text={"format": form})
    assert error.value.param == "text"
