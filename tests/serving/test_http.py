"""What is answered over real sockets, whole and in streams, to any client."""

import json
import re

import pytest

from tests.models import WITH_TOKENIZER
from tests.serving.harness import KEYS, ask, client_of, openai_client


def events(response):
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_has_its_fields(client):
    answer = ask(client, logprobs=2, milora={"return_route": True}, n=2, temperature=1.0, seed=3).json()
    assert (answer["object"], answer["model"]) == ("text_completion", "math")
    assert re.fullmatch("cmpl-[0-9a-f]{32}", answer["id"])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["finish_reason"] in ("length", "stop")
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
        assert all(len(top) <= 3 for top in logprobs["top_logprobs"]), "the token itself may be one more"
        assert all(map(lambda token, top: token in top, logprobs["tokens"], logprobs["top_logprobs"]))
    used = answer["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert used["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in answer["choices"])
    route = answer["milora"]["route"]
    assert len(route) == WITH_TOKENIZER.num_layers
    assert all(sum(weight > 0 for weight in layer) <= 3 for layer in route)
    assert answer["milora"]["experts"] == ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_is_the_whole_answer_in_pieces(client, n):
    asked = {"max_tokens": 30, "seed": 5, "temperature": 0.9, "n": n, "stop": ["zz"], "logprobs": 1}
    whole = ask(client, **asked).json()
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask(client, **asked))
    *pieces, last = chunks
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [piece["finish_reason"] for piece in mine][-1] == choice["finish_reason"]
        tokens = [token for piece in mine for token in piece["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
    assert all(piece["usage"] is None for piece in pieces)


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(client):
    whole = ask(client, max_tokens=40).json()["choices"][0]["text"]
    stop = next(whole[i : i + 2] for i in range(3, len(whole)) if whole[i : i + 2].isprintable())
    cut = ask(client, max_tokens=40, stop=stop).json()
    assert cut["choices"][0]["text"] == whole[: whole.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_the_official_client_works_unchanged(served):
    import openai

    client = openai_client(served[1], "one")
    assert [model.id for model in client.models.list()] == ["base", "math"]
    messages = [{"role": "system", "content": "You add."}, {"role": "user", "content": "1 + 1?"}]
    asked = {"model": "math", "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, seed=1)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    assert all(len(token.top_logprobs) == 3 for token in whole.choices[0].logprobs.content)
    stream = client.chat.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content
    completion = client.completions.create(model="base", prompt="x", max_tokens=3, temperature=0)
    assert completion.usage.completion_tokens == 3
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="law", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="math", prompt="x", max_tokens=1000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served[1]}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_official_async_client_works_too(served):
    import asyncio

    import openai

    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{served[1]}/v1", api_key=KEYS["one"]) as client:
            asked = {"model": "math", "prompt": "hello", "max_tokens": 6, "temperature": 0}
            several = await asyncio.gather(*(client.completions.create(**asked) for _ in range(6)))
            stream = await client.completions.create(**asked, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
            return {each.choices[0].text for each in several} | {text}

    assert len(asyncio.run(talk())) == 1


def test_adapters_are_a_tenants_own(served):
    with client_of(served, "one") as one, client_of(served, "two") as two:
        assert [model["id"] for model in two.get("/v1/models").json()["data"]] == [
            "base",
            "art",
            "law",
            "math",
        ]
        foreign, missing = ask(one, model="law"), ask(one, model="lax")
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text.replace("law", "lax") == missing.text
        assert ask(two, model="law").status_code == 200


ADDRESSES = ["../x", "/etc/passwd", "math/../law", "ma\u0442h", "x" * 10_000, "%2e%2e", "", "MATH", " math"]


@pytest.mark.parametrize("name", ADDRESSES, ids=range(len(ADDRESSES)))
def test_a_name_is_never_a_path(client, name, monkeypatch):
    answer = ask(client, model=name)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert len(answer.text) < 500
