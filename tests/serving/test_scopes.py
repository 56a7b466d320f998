"""A server whose adapters read the first turn or the system message of a chat, beside those that read all."""

import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.prompt_format import PromptFormat
from tests.serving.harness import ask, client_of
from tests.storage.adapters import noisy_adapter, write_run

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is 1 and 1"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "why is that so"},
]


@pytest.fixture(scope="module")
def scoped(served):
    """Names of two adapters that were loaded while the server runs."""
    service, _, folder = served
    store, model = service.store, folder / "model"
    base, config = load_base(model)
    for seed, part in enumerate(("first_turn", "system")):
        adapter = noisy_adapter(base, config, seed=40 + seed, route_on=part)
        write_run(folder / part, model, adapter.replace(prompt_format=PromptFormat("chat")))
        store.load(part, folder / part)
    yield
    for part in ("first_turn", "system"):
        store.unload(part)


@pytest.fixture
def many(served):
    with client_of(served, "many") as client:
        yield client


def chat(client, model, messages):
    body = {"model": model, "messages": messages, "max_tokens": 4, "milora": {"return_route": True}}
    return client.post("/v1/chat/completions", json=body)


def route_of(answer):
    return np.array(answer.json()["milora"]["route"])


@pytest.mark.parametrize(("model", "same"), [("first_turn", True), ("system", True), ("art", False)])
def test_later_turns_keep_the_route_where_routers_read_a_part(scoped, many, model, same):
    answers = [chat(many, model, TALK[:count]) for count in (2, 4)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    first, second = map(route_of, answers)
    assert (first == second).all() == same
    contents = ("be long and polite in what you say", "answer in French", "1 2 3 4 5 6 7 8 9")
    others = [chat(many, model, [{**TALK[0], "content": content}, TALK[1]]) for content in contents]
    assert any((route_of(other) != first).any() for other in others)
    usage = [answer.json()["usage"]["prompt_tokens"] for answer in answers]
    assert usage[0] < usage[1]


def test_a_text_is_the_first_turn_and_no_system_message(scoped, many):
    assert ask(many, model="first_turn").status_code == 200
    answer = ask(many, model="system")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "prompt"
    assert "model 'system'" in error["message"]
    assert "expected a chat" in error["message"]
    answer = chat(many, "system", TALK[1:2])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "no system message" in answer.json()["error"]["message"]
