"""What is refused, in OpenAI's shape, naming the field."""

import contextlib
import json
import random
import socket

import httpx
import pytest
from pydantic import ValidationError

from milora_jax.serving.requests import ChatRequest
from tests.serving.harness import ask

BAD = {
    "no model": ({"model": ...}, "model"),
    "no prompt": ({"prompt": ...}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "an empty list": ({"prompt": []}, "prompt"),
    "texts and tokens": ({"prompt": ["a", 5]}, "prompt"),
    "an empty one of several": ({"prompt": ["a", ""]}, "prompt"),
    "an empty list of several": ({"prompt": [[5], []]}, "prompt"),
    "lists of lists": ({"prompt": [[[5]]]}, "prompt"),
    "many prompts": ({"prompt": ["a"] * 65}, "prompt"),
    "a long one of several": ({"prompt": [[5], [5] * 97]}, None),
    "a route of several": ({"prompt": ["a", "b"], "milora": {"return_route": True}}, "milora"),
    "a token that is none": ({"prompt": [5, 99999]}, None),
    "a negative token": ({"prompt": [-1]}, "prompt"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "a truth as a number": ({"max_tokens": True}, "max_tokens"),
    "a fraction of tokens": ({"max_tokens": 1.5}, "max_tokens"),
    "too many tokens": ({"max_tokens": 97}, "max_tokens"),
    "more tokens than there are": ({"max_tokens": 2**63}, "max_tokens"),
    "text as a temperature": ({"temperature": "hot"}, "temperature"),
    "a cold below zero": ({"temperature": -0.1}, "temperature"),
    "top_p of nothing": ({"top_p": 0}, "top_p"),
    "too many samples": ({"n": 3}, "n"),
    "many samples": ({"n": 10**9}, "n"),
    "best_of": ({"best_of": 4}, "best_of"),
    "an echo that is no truth": ({"echo": 1}, "echo"),
    "no tokens and no echo": ({"max_tokens": 0, "logprobs": 1, "echo": False}, "max_tokens"),
    "an echo that is too long": ({"prompt": [5] * 97, "echo": True, "max_tokens": 0}, "prompt"),
    "many log-probabilities": ({"logprobs": 6}, "logprobs"),
    "an unknown field": ({"temprature": 1}, "temprature"),
    "a path": ({"lora_path": "/etc"}, "lora_path"),
    "a template": ({"chat_template": "{{ 1 }}"}, "chat_template"),
    "many stops": ({"stop": ["a"] * 5}, "stop"),
    "a long stop": ({"stop": "a" * 65}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "a stop token that is none": ({"stop_token_ids": [99999]}, None),
    "a bias of a word": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "a bias of another writing": ({"logit_bias": {"05": 1}}, "logit_bias"),
    "a bias of a token that is none": ({"logit_bias": {"99999": 1}}, "logit_bias"),
    "a bias that is too large": ({"logit_bias": {"5": 101}}, "logit_bias"),
    "a bias that is a text": ({"logit_bias": {"5": "1"}}, "logit_bias"),
    "many biases": ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    "frequency": ({"frequency_penalty": 2.5}, "frequency_penalty"),
    "labels that are numbers": ({"metadata": {"a": 1}}, "metadata"),
    "many labels": ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    "storage": ({"store": True}, "store"),
    "a seed that is too large": ({"seed": 2**70}, "seed"),
    "a surrogate": ({"prompt": "\ud800"}, None),
    "a NUL": ({"prompt": "a\0b"}, None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_is_named(client, name):
    more, field = BAD[name]
    body = {"model": "math", "prompt": "x", "max_tokens": 4, **more}
    content = json.dumps({k: v for k, v in body.items() if v is not ...})
    answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if field:
        assert error["param"] == field


BODIES = {
    "nothing": b"",
    "half": b'{"model": "math"',
    "a list": b"[]",
    "a number": b"1",
    "not a number": b'{"model": "math", "prompt": "x", "temperature": NaN}',
    "infinity": b'{"model": "math", "prompt": "x", "temperature": 1e999}',
    "doubled": b'{"model": "math", "model": "law", "prompt": "x"}',
    "bad UTF-8": b'{"model": "math", "prompt": "\xff"}',
    "deep": b'{"model": ' + b"[" * 20000 + b"]" * 20000 + b"}",
    "endless digits": b'{"model": "math", "prompt": "x", "seed": ' + b"9" * 9999 + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_none_is_refused(client, name):
    answer = client.post(
        "/v1/completions", content=BODIES[name], headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_other_kinds_of_bodies_are_refused(client):
    for headers in ({"Content-Type": "text/plain"}, {}, {"Content-Type": "multipart/form-data"}):
        assert client.post("/v1/completions", content=b"{}", headers=headers).status_code == 415
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert client.post("/v1/completions", content=b"{}", headers=headers).status_code == 415


def test_paths_and_methods_that_are_none(client):
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/v1/nothing").status_code == 404
    assert client.post("/v1/models").status_code == 405
    assert client.request("OPTIONS", "/v1/models").status_code == 405


def test_a_body_is_so_long_and_no_longer(client, monkeypatch):
    def trickle():
        for _ in range(40):
            yield b" " * 2**15

    headers = {"Content-Type": "application/json"}
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        assert client.post("/v1/completions", content=trickle(), headers=headers).status_code == 413
    assert client.post("/v1/completions", content=b" " * (2**20 + 1), headers=headers).status_code == 413


def test_chats_are_checked(client):
    good = {"model": "math", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=good).status_code == 200
    for messages in (
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": "x"}] * 257,
    ):
        answer = client.post("/v1/chat/completions", json={**good, "messages": messages})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("messages")
    for extra in ({"echo": True}, {"tools": [{}]}, {"response_format": {"type": "xml"}}, {"top_logprobs": 2}):
        answer = client.post("/v1/chat/completions", json={**good, **extra})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(extra))


def test_a_content_part_that_is_no_text_is_named_by_its_type(client):
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    body = {"model": "math", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}
    error = client.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("messages.content", "unsupported_parameter")
    assert '"image_url" is not supported: expected text' in error["message"]


RESPONSES = {
    "no input": ({"input": ...}, "input"),
    "an empty input": ({"input": ""}, "input"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.content"),
    "a call": ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input.type"),
    "a role": ({"input": [{"role": "tool", "content": "x"}]}, "input"),
    "many messages": ({"input": [{"role": "user", "content": "x"}] * 257}, "input"),
    "a long input": ({"input": "x " * 400, "max_output_tokens": ...}, "input"),
    "many tokens": ({"max_output_tokens": 97}, "max_output_tokens"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "a chain": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "storage": ({"store": True}, "store"),
    "a tool": ({"tools": [{"type": "web_search"}]}, "tools"),
    "a schema": ({"text": {"format": {"type": "json_schema"}}}, "text"),
    "the background": ({"background": True}, "background"),
    "a field of chats": ({"max_tokens": 5}, "max_tokens"),
    "a mistake": ({"inputs": "x"}, "inputs"),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_bad_field_of_a_response_is_named(client, name):
    more, field = RESPONSES[name]
    body = {"model": "math", "input": "x", "max_output_tokens": 4, **more}
    answer = client.post("/v1/responses", json={k: v for k, v in body.items() if v is not ...})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


TOKENS = {
    "nothing": ("/tokenize", {}, "prompt"),
    "both": ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    "several": ("/tokenize", {"prompt": ["x"]}, "prompt"),
    "far too long": ("/tokenize", {"prompt": "x" * 900_000}, "prompt"),
    "a prompt's assistant": ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, None),
    "special tokens of a chat": (
        "/tokenize",
        {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
        "add_special_tokens",
    ),
    "a text": ("/detokenize", {"tokens": "x"}, "tokens"),
    "a token that is none": ("/detokenize", {"tokens": [99999]}, "tokens"),
    "a negative token": ("/detokenize", {"tokens": [-1]}, "tokens"),
    "many tokens": ("/detokenize", {"tokens": [5] * 97}, "tokens"),
    "no tokens": ("/detokenize", {}, "tokens"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_what_cannot_be_tokenized_is_refused(client, name):
    path, body, field = TOKENS[name]
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert field is None or answer.json()["error"]["param"] == field


@pytest.mark.thorough
def test_five_hundred_mutated_bodies_are_answered_and_none_breaks_anything(client):
    rng = random.Random(0)
    fields = [
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stream",
        "stop",
        "seed",
        "logprobs",
    ]
    fields += [
        "presence_penalty",
        "top_k",
        "min_p",
        "stop_token_ids",
        "milora",
        "user",
        "stream_options",
        "echo",
    ]
    values = [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        2**31,
        2**64,
        -(2**64),
        0.5,
        1e308,
        -0.0,
        "",
        "x",
        "\u202e",
        "math",
    ]
    values += [
        [],
        {},
        [1],
        ["a"],
        [[1]],
        {"return_route": True},
        {"include_usage": True},
        [None],
        "a" * 300,
        "😀",
    ]
    seen = set()
    for _ in range(500):
        body = {"model": "math", "prompt": "x", "max_tokens": 2}
        for _ in range(rng.randint(1, 3)):
            body[rng.choice(fields)] = rng.choice(values)
        answer = client.post("/v1/completions", json=body)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert seen == {200, 400, 404}


def test_a_connection_with_a_body_that_nobody_reads_is_not_kept(served):
    """The refusal comes before the body; then a byte of it, and nothing more."""
    host, port = served[1].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        connection.settimeout(10)
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        connection.sendall(b"x")
        while connection.recv(4096):
            pass
    served[0].admission.wrong_keys.clear()


@pytest.mark.parametrize("field", ["messages", "stop"])
def test_of_many_wrong_entries_the_first_is_told(field):
    values = {"model": "m", "messages": [{"role": "user", "content": "x"}], field: [{}] * 4000}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(values)
    assert caught.value.error_count() < 10


def test_a_text_that_cannot_fit_is_not_cut_into_tokens(served, client, monkeypatch):
    monkeypatch.setattr("milora_jax.serving.service.prompt_ids", None)
    assert ask(client, prompt="x" * 900_000).json()["error"]["code"] == "context_length_exceeded"
