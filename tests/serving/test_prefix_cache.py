"""The prefix cache of a server: who finds whose prompts, and what the answer says of it."""

import dataclasses

import pytest

from milora_jax.serving.limits import Limits
from tests.serving.harness import (
    LIMITS,
    ask,
    client_of,
    openai_client,
    running,
    service_of,
    serving,
    write_model,
)

PROMPT = list(range(10, 80))
"""A whole block, and a part of one."""


def cached(client, prompt, **more):
    answer = ask(client, prompt=prompt, max_tokens=2, **more).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"]


def test_a_prompt_is_found_again_and_the_answer_is_the_same(client):
    prompt = [9, *PROMPT]
    first, second = (cached(client, prompt, temperature=0, logprobs=2) for _ in range(2))
    assert (first[0], second[0]) == (0, 64)
    assert first[1] == second[1]


def test_a_longer_prompt_is_found_where_no_route_depends_on_it(client):
    prompt = [8, *PROMPT]
    assert [cached(client, prompt, model=name)[0] for name in ("math", "base")] == [0, 0]
    assert [cached(client, [*prompt, 7], model=name)[0] for name in ("math", "base")] == [0, 64]


def test_tenants_and_salts_are_apart(served, client):
    prompt = [7, *PROMPT]
    assert cached(client, prompt)[0] == 0
    with client_of(served, "many") as other:
        assert [cached(other, prompt)[0] for _ in range(2)] == [0, 64]
    assert [cached(client, prompt, cache_salt="mine")[0] for _ in range(2)] == [0, 64]
    assert cached(client, prompt)[0] == 64


def test_a_new_version_of_an_adapter_finds_nothing_of_the_old(served, client):
    service, _, folder = served
    prompt = [6, *PROMPT]
    assert [cached(client, prompt)[0] for _ in range(2)] == [0, 64]
    service.store.load("math", folder / "law")
    try:
        assert cached(client, prompt)[0] == 0
    finally:
        service.store.load("math", folder / "math")
    assert cached(client, prompt)[0] == 64


def test_streams_and_chats_report_it(served):
    _, address, _ = served
    client = openai_client(address, "one")
    messages = [{"role": "user", "content": "What is 3 * 7? " * 5}]
    found = []
    for _ in range(2):
        stream = client.chat.completions.create(
            model="base", messages=messages, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
        *_, last = stream
        found.append(last.usage.prompt_tokens_details.cached_tokens)
    assert 64 < last.usage.prompt_tokens < 96
    assert found == [0, 64]


def test_the_metrics_count_it(served, client):
    service, _, _ = served
    prompt, before = [5, *PROMPT], dataclasses.replace(service.engine.prefix_cache.counts)
    for _ in range(2):
        cached(client, prompt)
    after = service.engine.prefix_cache.counts
    assert after.queries - before.queries == 2 * len(prompt)
    assert after.hits - before.hits == 64
    text = service.metrics.text().decode()
    assert f"milora_prefix_cache_hits_total {float(after.hits)}" in text
    assert "# TYPE milora_prefix_cache_hits_total counter" in text
    assert f"milora_prefix_cache_bytes {float(after.used)}" in text


@pytest.mark.thorough
def test_an_operator_may_share_or_switch_it_off(tmp_path, ring):
    adapters = write_model(tmp_path)
    expected = {(0, 256): [0, 0], (1, 256): [0, 64], (1, 0): [0, 0]}
    for (share, size), found in expected.items():
        limits = dataclasses.replace(LIMITS, share_prefixes=share, prefix_cache=size)
        service, registry = service_of(tmp_path, {"math": adapters["math"]}, limits)
        with running(service), serving(service, registry, ring) as address:
            clients = [client_of((service, address, tmp_path), name) for name in ("one", "many")]
            assert [cached(client, PROMPT)[0] for client in clients] == found
            for client in clients:
                client.close()


@pytest.mark.parametrize("name", ["prefill_budget", "prefix_cache", "share_prefixes"])
def test_limits_are_not_negative(name):
    with pytest.raises(Exception, match="at least 0"):
        Limits(**{name: -1})
