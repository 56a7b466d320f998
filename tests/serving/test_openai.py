"""The official client, line by line of the surface: what it sends is done, or is refused by name."""

import openai
import pytest

from milora_jax.serving.responses_api import ResponsesRequest
from tests.serving.harness import Listener, client_of, openai_client

CHAT = {
    "model": "math",
    "messages": [{"role": "user", "content": "1 + 1?"}],
    "max_tokens": 6,
    "temperature": 0,
}
TEXT = {"model": "math", "prompt": "What is 3 * 7?", "max_tokens": 6, "temperature": 0}
INPUT = {"model": "math", "input": "1 + 1?", "max_output_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def one(served):
    with openai_client(served[1], "one") as client:
        yield client


def chat(one, **more):
    return one.chat.completions.create(**{**CHAT, **more}).choices[0].message.content


def complete(one, **more):
    return one.completions.create(**{**TEXT, **more})


def test_a_model_is_looked_up_by_its_name(one):
    assert one.models.retrieve("math").id == "math"
    assert one.models.retrieve("base").object == "model"
    errors = []
    for name in ("law", "lax"):  # another tenant's, and none
        with pytest.raises(openai.NotFoundError) as caught:
            one.models.retrieve(name)
        errors.append(caught.value)
    assert errors[0].code == errors[1].code == "model_not_found"
    assert str(errors[0]).replace("law", "lax") == str(errors[1])


NOTHING = {
    "metadata": {"run": "7"},
    "store": False,
    "service_tier": "auto",
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "tools": [],
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "verbosity": "medium",
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "n": 1,
    "top_p": 1,
    "stream": False,
    "reasoning_effort": None,
    "prediction": None,
    "audio": None,
}


def test_what_asks_for_nothing_changes_nothing(one):
    plain = chat(one)
    for name, value in NOTHING.items():
        assert chat(one, **{name: value}) == plain, name
    assert chat(one, **NOTHING) == plain
    kept = ("metadata", "store", "service_tier", "user", "frequency_penalty", "logit_bias", "n", "top_p")
    extra = {"extra_body": {name: NOTHING[name] for name in kept}}
    assert complete(one, **extra).choices[0].text == complete(one).choices[0].text
    for name, value in {
        "store": True,
        "service_tier": "flex",
        "modalities": ["audio"],
        "stroe": False,
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            chat(one, extra_body={name: value})
        assert caught.value.param == name


def test_content_parts_and_the_developer(one):
    parts = [{"type": "text", "text": "1 +"}, {"type": "text", "text": "1?"}]
    joined = chat(one, messages=[{"role": "user", "content": "1 +\n1?"}])
    assert chat(one, messages=[{"role": "user", "content": parts}]) == joined
    system, developer = (
        [{"role": role, "content": [{"type": "text", "text": "You add."}]}, CHAT["messages"][0]]
        for role in ("system", "developer")
    )
    assert chat(one, messages=developer) == chat(one, messages=system) != chat(one)
    said = [*system, {"role": "assistant", "content": parts, "refusal": None, "tool_calls": None}, system[1]]
    assert chat(one, messages=said)


def test_a_bias_and_a_frequency_change_the_tokens(one):
    plain = complete(one, logprobs=1, max_tokens=20).choices[0]
    forced = complete(one, logit_bias={"50": 100}, max_tokens=5, logprobs=0).choices[0].logprobs.tokens
    assert forced == forced[:1] * 5
    worn = complete(one, logit_bias={"50": 100}, frequency_penalty=2, max_tokens=60, logprobs=0)
    assert worn.choices[0].logprobs.tokens.count(forced[0]) < 60
    said = chat(one, max_tokens=40)
    assert chat(one, max_tokens=40, frequency_penalty=2) != said
    assert chat(one, max_tokens=40, frequency_penalty=0, logit_bias={"50": 0}) == said
    assert complete(one, logprobs=1, max_tokens=20).choices[0] == plain


@pytest.mark.parametrize("new", [0, 1, 4])
def test_an_echo_has_the_prompt_and_its_log_probabilities(one, new):
    made = complete(one, max_tokens=new, echo=True, logprobs=2)
    choice = made.choices[0]
    assert choice.text == TEXT["prompt"] + (complete(one, max_tokens=new).choices[0].text if new else "")
    assert choice.finish_reason == "length"
    assert made.usage.completion_tokens == new
    found, count = choice.logprobs, made.usage.prompt_tokens
    lists = (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)
    assert {len(each) for each in lists} == {count + new}
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    for token, value, top in list(zip(*lists[:3], strict=True))[1:]:
        assert value <= 0
        assert top[token] == value or token.startswith("\N{REPLACEMENT CHARACTER}")
        parts_of_characters = any("\N{REPLACEMENT CHARACTER}" in text for text in top)
        assert 2 <= len(top) <= 3 or parts_of_characters, "which have one text, and so one key"
    assert found.text_offset[0] == 0
    assert complete(one, max_tokens=new, echo=True).choices[0].text == choice.text


def test_an_echo_scores_tokens_as_they_were_generated(one, served):
    """By the base: a route would be that of the longer prompt."""
    ids = one.post("../tokenize", body={"prompt": TEXT["prompt"]}, cast_to=object)["tokens"]
    made = Listener(served[0], "base", ids, max_new_tokens=8, logprobs=1)
    (tokens,), (logprobs,), _ = made.end()
    scored = complete(one, model="base", prompt=ids + tokens, max_tokens=0, logprobs=1, echo=True)
    found = scored.choices[0].logprobs.token_logprobs[len(ids) :]
    assert max(abs(a - b.logprob) for a, b in zip(found, logprobs, strict=True)) < 1e-4


def test_several_prompts_are_what_each_is_alone(one):
    texts = ["What is 3 * 7?", "hello", "What is 1 + 1?"]
    asked = {"n": 2, "seed": 3, "temperature": 0.9, "logprobs": 1, "max_tokens": 8}
    together = complete(one, prompt=texts, **asked)
    alone = [complete(one, prompt=text, **asked) for text in texts]
    assert [choice.index for choice in together.choices] == list(range(6))
    expected = [choice for each in alone for choice in each.choices]
    for found, wanted in zip(together.choices, expected, strict=True):
        assert (found.text, found.logprobs, found.finish_reason) == (
            wanted.text,
            wanted.logprobs,
            wanted.finish_reason,
        )
    assert together.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)
    assert together.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone)
    for echo in (False, True):
        whole = complete(one, prompt=texts, **asked, echo=echo)
        pieces = [""] * 6
        tokens = [[] for _ in pieces]
        options = {"include_usage": True}
        for event in complete(one, prompt=texts, **asked, echo=echo, stream=True, stream_options=options):
            for choice in event.choices:
                pieces[choice.index] += choice.text
                tokens[choice.index] += choice.logprobs.tokens
        assert pieces == [choice.text for choice in whole.choices]
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]
        assert event.usage == whole.usage


def test_token_ids_are_a_prompt_as_they_are(one):
    ids = one.post("../tokenize", body={"model": "math", "prompt": "hello"}, cast_to=object)["tokens"]
    expected = complete(one, prompt="hello").choices[0].text
    assert complete(one, prompt=ids).choices[0].text == expected
    assert [c.text for c in complete(one, prompt=[ids, ids]).choices] == [expected] * 2
    echoed = complete(one, prompt=[ids], echo=True, max_tokens=0).choices[0]
    assert "hello" in echoed.text


def test_responses_are_created(one):
    made = one.responses.create(**INPUT, instructions="You add.", metadata={"a": "b"})
    messages = [{"role": "system", "content": "You add."}, {"role": "user", "content": "1 + 1?"}]
    assert made.output_text == chat(one, messages=messages)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (made.metadata, made.error, made.instructions) == ({"a": "b"}, None, "You add.")
    assert made.usage.total_tokens == made.usage.input_tokens + 6
    assert made.usage.input_tokens_details.cached_tokens == 0
    said = [
        {"role": "developer", "content": "You add."},
        {"role": "user", "content": [{"type": "input_text", "text": "1 + 1?"}]},
    ]
    again = one.responses.create(**{**INPUT, "input": said}, store=False, text={"format": {"type": "text"}})
    assert again.output_text == made.output_text
    history = [*said, *(item.model_dump() for item in again.output), {"role": "user", "content": "2 + 2?"}]
    assert one.responses.create(**{**INPUT, "input": history}).output_text
    with pytest.raises(openai.BadRequestError) as caught:
        one.responses.create(**INPUT, previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        one.responses.create(**{**INPUT, "model": "law"})


def test_responses_are_streamed(one):
    whole = one.responses.create(**INPUT)
    events = list(one.responses.create(**INPUT, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-4].text
    assert {event.item_id for event in deltas} == {events[-1].response.output[0].id}
    assert events[-1].response.usage == whole.usage
    with one.responses.stream(**INPUT) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == whole.output_text


def test_a_response_that_ends_by_itself_is_complete(one, served, monkeypatch):
    as_chat, end = ResponsesRequest.as_chat, str(served[0].engine.config.eos_ids[0])
    monkeypatch.setattr(
        ResponsesRequest,
        "as_chat",
        lambda self: as_chat(self).model_copy(update={"logit_bias": {end: 100.0}}),
    )
    made = one.responses.create(**INPUT)
    assert (made.status, made.incomplete_details, made.output_text) == ("completed", None, "")
    with one.responses.stream(**INPUT) as stream:
        final = stream.get_final_response()
    assert (final.status, final.usage) == ("completed", made.usage)


def test_tokens_come_and_go(served):
    with client_of(served, "one") as client:
        body = {"model": "math", "prompt": "hello you", "return_token_strs": True}
        found = client.post("/tokenize", json=body).json()
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == 96
        used = client.post("/v1/completions", json={**TEXT, "prompt": "hello you"}).json()["usage"]
        assert found["count"] == used["prompt_tokens"]
        bare = client.post("/tokenize", json={**body, "add_special_tokens": False}).json()
        assert found["tokens"][-bare["count"] :] == bare["tokens"]
        back = client.post("/detokenize", json={"tokens": bare["tokens"]}).json()
        assert back["prompt"].strip() == "hello you"
        assert client.post("/tokenize", json={"prompt": "hello"}).json()["token_strs"] is None
        chat = {"messages": CHAT["messages"]}
        opened = client.post("/tokenize", json=chat).json()
        used = client.post("/v1/chat/completions", json=CHAT).json()["usage"]
        assert opened["count"] == used["prompt_tokens"]
        closed = client.post("/tokenize", json={**chat, "add_generation_prompt": False}).json()
        assert closed["tokens"] == opened["tokens"][: closed["count"]]
        assert closed["count"] < opened["count"]
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
            assert client.post(path, json={**body, "model": "law"}).status_code == 404
    with client_of(served, "") as nobody:
        assert nobody.post("/tokenize", json={"prompt": "x"}).status_code == 401
    with client_of(served, "monitor") as monitor:
        assert monitor.post("/detokenize", json={"tokens": [5]}).status_code == 403


def test_a_failed_prompt_ends_the_others(served, one, monkeypatch):
    service = served[0]
    submit, count = service.engine.submit, iter(range(9))

    def failing(*given, **more):
        if next(count) == 1:
            raise RuntimeError("out of memory")
        return submit(*given, **more)

    monkeypatch.setattr(service.engine, "submit", failing)
    with pytest.raises(openai.InternalServerError):
        complete(one, prompt=["a", "b", "c"], max_tokens=60)
    monkeypatch.undo()
    assert complete(one, prompt=["a", "b"]).choices
    assert served[0].admission.queued_tokens == 0
