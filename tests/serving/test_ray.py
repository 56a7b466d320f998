"""Two replicas under Ray Serve, asked as a client asks."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.serving.harness import KEYS, client_of, digest, write_model

pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and loops of its own processes to be collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Two engines and a front: (None, address), as ``harness.client_of`` takes it, and the adapters."""
    ray = pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")
    from ray import serve

    from milora_jax.serving.ray_serve import build

    folder = tmp_path_factory.mktemp("ray")
    adapters = write_model(folder)
    keys = folder / "keys.json"
    tenants = [
        {"name": "one", "sha256": digest("one"), "concurrency": 64},
        {"name": "two", "sha256": digest("two"), "adapters": ["math"], "concurrency": 64},
    ]
    keys.write_text(json.dumps({"tenants": tenants, "admin": [digest("admin")]}))
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    named = ",".join(f"{name}={path}" for name, path in adapters.items() if name != "art")
    arguments = {"base": str(folder / "model"), "adapters": named, "replicas": "2", "keys": str(keys)}
    registry = folder / "registry.json"
    art = {"path": str(adapters["art"]), "loaded": False, "pinned": False}
    registry.write_text(json.dumps({"adapters": {"art": art}}))
    limits = {"rows": "4", "context": "96", "queue": "64"}
    serve.run(build({**arguments, **limits, "registry": str(registry)}), name="milora", route_prefix="/")
    yield None, f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def ask(client, path="/v1/completions", **more):
    return client.post(path, json={"model": "math", "prompt": "What is 3 * 7?", "max_tokens": 8, **more})


def engine_tokens(deployed):
    """Tokens that each engine has made, by its number."""
    found = {}
    with client_of(deployed, "admin") as client:
        text = client.get("/metrics").text
    for line in text.splitlines():
        if line.startswith("milora_tokens_total{") and 'kind="completion"' in line:
            process = line.split('process="')[1].split('"')[0]
            found[process] = found.get(process, 0.0) + float(line.rsplit(" ", 1)[1])
    return {name: count for name, count in found.items() if name != "front"}


def test_two_replicas_answer_alike(deployed):
    answers = []

    def one():
        with client_of(deployed, "one") as client:
            answers.append(ask(client, temperature=0, max_tokens=64, ignore_eos=True).json())

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    tokens = engine_tokens(deployed)
    assert len(tokens) == 2, tokens
    assert sum(tokens.values()) == 16 * 64


def test_the_openai_client_streams(deployed):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{deployed[1]}/v1", api_key=KEYS["one"]) as client:
        assert [model.id for model in client.models.list()] == ["base", "law", "math"]
        whole = client.completions.create(model="law", prompt="x", max_tokens=9, temperature=0)
        pieces = client.completions.create(model="law", prompt="x", max_tokens=9, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        chat = client.chat.completions.create(
            model="math",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=5,
            extra_body={"milora": {"return_route": True}},
        )
        assert chat.milora["route"]


def test_new_fields_cross_to_the_engines(deployed):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{deployed[1]}/v1", api_key=KEYS["one"]) as client:
        assert client.models.retrieve("law").id == "law"
        asked = {"model": "law", "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
        several = client.completions.create(prompt=["x", "hello you"], **asked, frequency_penalty=1)
        assert [choice.index for choice in several.choices] == [0, 1]
        assert all(choice.logprobs.token_logprobs[0] is None for choice in several.choices)
        forced = client.completions.create(prompt="x", **asked, logit_bias={"50": 100}).choices[0]
        assert len(set(forced.logprobs.tokens[-4:])) == 1
        made = client.responses.create(model="law", input="x", max_output_tokens=5, temperature=0)
        *_, last = client.responses.create(
            model="law", input="x", max_output_tokens=5, temperature=0, stream=True
        )
        assert last.response.output_text == made.output_text
        tokens = client.post("../tokenize", body={"model": "law", "prompt": "hello you"}, cast_to=object)
        whole = client.completions.create(model="law", prompt="hello you", max_tokens=1).usage
        assert tokens["count"] == whole.prompt_tokens
        back = client.post("../detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)
        assert "hello you" in back["prompt"]
        for path, body in (
            ("../tokenize", {"prompt": "x", "model": "lax"}),
            ("../detokenize", {"tokens": [9**9]}),
        ):
            with pytest.raises(openai.APIStatusError) as caught:
                client.post(path, body=body, cast_to=object)
            assert caught.value.status_code in (400, 404)


@pytest.mark.parametrize(
    ("name", "more", "status"),
    [
        ("", {}, 401),
        ("two", {"model": "law"}, 404),
        ("one", {"model": "nothing"}, 404),
        ("one", {"max_tokens": 10**6}, 400),
        ("one", {"unknown": 1}, 400),
    ],
)
def test_what_is_refused_is_refused_as_by_one(deployed, name, more, status):
    with client_of(deployed, name) as client:
        answer = ask(client, **more)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_an_adapter_is_loaded_on_all_replicas(deployed):
    with client_of(deployed, "admin") as admin, client_of(deployed, "one") as one:
        assert ask(one, model="art").status_code == 404
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "art"}).status_code == 200
        found = [ask(one, model="art", temperature=0) for _ in range(12)]
        assert {answer.status_code for answer in found} == {200}
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "art"}).status_code == 200
        assert ask(one, model="art").status_code == 404


def test_one_who_leaves_frees_the_row_of_its_replica(deployed):
    host, port = deployed[1].removeprefix("http://").split(":")
    body = json.dumps({"model": "math", "prompt": "x", "max_tokens": 90, "stream": True, "ignore_eos": True})
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS['one']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    for _ in range(8):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request.encode())
            connection.recv(64)
    with client_of(deployed, "one") as client:
        for _ in range(200):
            state = client.get("/health/ready").json()
            if state == {"status": "ready", "free_slots": 8, "under_way": 0}:
                return
            time.sleep(0.1)
    raise AssertionError(state)
