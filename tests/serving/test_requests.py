"""Request bodies: values without effect are accepted, unsupported ones are refused by the field's name."""

import itertools
import json

import pytest
from pydantic import ValidationError

from milora_jax.serving.api_errors import APIError
from milora_jax.serving.limits import Limits
from milora_jax.serving.request_base import invalid_request, parse_body
from milora_jax.serving.requests import (
    AdapterRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    TextPart,
)
from milora_jax.serving.responses_api import InputMessage, InputPart, ResponsesRequest, TextOptions
from milora_jax.serving.tokenization import TokenizeRequest
from tests.serving.harness import openapi

BODIES = {
    CompletionRequest: {"model": "m", "prompt": "x"},
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    AdapterRequest: {"lora_name": "m"},
    ResponsesRequest: {"model": "m", "input": "x"},
    TokenizeRequest: {"prompt": "x"},
}
KINDS = list(BODIES)

SOMETHING = {
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "response_format": [{"type": "json_object"}, {"type": "text", "schema": {}}, "text"],
    "modalities": [["text", "audio"], []],
    "service_tier": ["flex"],
    "echo": [True, 0],
    "best_of": [2, True],
    "suffix": ["x"],
    "truncate_prompt_tokens": [-1, 0],
    "structured_outputs": [{"json": {}}, {}],
    "reasoning_effort": ["low"],
}
"""Values that ask for something, where a few other ones do not say it all."""


def read(kind, **more):
    try:
        return kind.model_validate(parse_body(json.dumps({**BODIES[kind], **more}).encode()))
    except ValidationError as error:
        raise invalid_request(error.errors()) from None


def refused(kind, **more):
    with pytest.raises(APIError) as caught:
        read(kind, **more)
    return caught.value.body["error"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_is_not_served_may_ask_for_nothing(kind):
    plain = read(kind)
    for name, values in kind.unsupported.items():
        for value in (None, *values):
            assert read(kind, **{name: value}) == plain, (name, value)
    together = {name: values[0] if values else None for name, values in kind.unsupported.items()}
    assert read(kind, **together) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_is_not_served_is_named_where_it_asks_for_something(kind):
    for name, values in kind.unsupported.items():
        for value in SOMETHING.get(name, [{"x": [1]}, 7]):
            error = refused(kind, **{name: value})
            assert (error["param"], error["code"]) == (name, "unsupported_parameter"), (name, value)
            assert error["message"].startswith(f"{name} is not supported: expected null")
        assert not values or json.dumps(values[0]) in error["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_null_asks_for_nothing_in_every_optional_field(kind):
    plain, required = read(kind), BODIES[kind].keys()
    for name in kind.model_fields.keys() - required:
        assert read(kind, **{name: None}) == plain
    for name in required:
        assert refused(kind, **{name: None})["param"] == name


def test_what_is_nested_may_ask_for_nothing_too():
    plain = read(ChatRequest)
    assert read(ChatRequest, milora={"return_route": None}).return_route is False
    assert read(ChatRequest, stream_options={"include_usage": None}).include_usage is False
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": None}
    assert read(ChatRequest, stream_options=options).stream_options == StreamOptions(include_usage=True)
    assert refused(ChatRequest, stream_options={"include_obfuscation": True})["param"] == (
        "stream_options.include_obfuscation"
    )
    said = {**BODIES[ChatRequest]["messages"][0], "name": None, **dict.fromkeys(ChatMessage.unsupported)}
    assert read(ChatRequest, messages=[said]) == plain
    called = read(ChatRequest, messages=[{**said, "tool_calls": [], "annotations": []}])
    assert called.chat(Limits()) == plain.chat(Limits())
    for calls in ([{}], 5, [{"id": "x", "type": "function", "function": {"name": "f"}}]):
        assert refused(ChatRequest, messages=[{**said, "tool_calls": calls}])["param"] == "messages"


def test_defaults_of_served_fields_are_served():
    defaults = {"n": 1, "stream": False, "temperature": 1, "top_p": 1, "stop": [], "presence_penalty": 0}
    defaults |= {"frequency_penalty": 0, "logit_bias": {}, "metadata": {}}
    defaults |= {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False, "stop_token_ids": []}
    for kind, more in (
        (CompletionRequest, {"echo": False}),
        (ChatRequest, {"logprobs": False, "top_logprobs": 0}),
    ):
        one, other = (
            read(kind, seed=3, **each).settings(Limits(), 5, 90, 16) for each in ({}, {**defaults, **more})
        )
        assert one == other


def test_what_names_a_client_has_no_effect():
    names = ("user", "safety_identifier", "prompt_cache_key", "cache_salt")
    for kind, name in itertools.product((CompletionRequest, ChatRequest), names):
        asked = read(kind, seed=3, **{name: "someone"})
        assert asked.settings(Limits(), 5, 90, 16) == read(kind, seed=3).settings(Limits(), 5, 90, 16)
        assert refused(kind, **{name: 5})["param"] == name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["temprature", "logit_biases", "unsupported", "Tools"])
def test_a_field_that_is_not_known_is_refused_even_if_it_is_null(kind, name):
    for value in (None, 1, []):
        error = refused(kind, **{name: value})
        assert error["param"] == name
        assert "Unrecognized request argument" in error["message"]


def test_log_probabilities_of_others_need_those_of_the_tokens():
    assert read(ChatRequest, logprobs=True, top_logprobs=3).logprobs_wanted() == 3
    for more in ({}, {"logprobs": False}, {"logprobs": None}):
        assert refused(ChatRequest, top_logprobs=3, **more)["param"] == "top_logprobs"


def test_the_document_has_the_values():
    schemas = openapi()["components"]["schemas"]
    for kind in (*KINDS, ChatMessage, StreamOptions, TextPart, InputMessage, InputPart, TextOptions):
        properties = schemas[kind.__name__]["properties"]
        for name, values in kind.unsupported.items():
            assert properties[name]["enum"] == [None, *values]
        assert properties.keys() == kind.model_fields.keys() | kind.unsupported.keys()
