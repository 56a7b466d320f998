"""``serve.py`` as an operator runs it: started, used, told to stop, killed, started again."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.paths import ROOT
from tests.serving.harness import ask, write_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    write_model(folder)
    return folder


def start(folder, *more):
    """A server and its address."""
    command = [sys.executable, "serve.py", "--base", folder / "model", "--port", "0", "--rows", "2"]
    command += ["--samples", "1", "--context", "64", "--registry", folder / "registry.json", *more]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=file, env={**os.environ})
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("serving "):
                return process, line.split()[-1]
        time.sleep(0.1)
    raise AssertionError(f"the server ended: {log.read_text()}")


@pytest.mark.slow
def test_a_server_is_stopped_killed_and_started_again(folder):
    process, address = start(
        folder, "--adapter", f"math={folder / 'math'}", "--adapter", f"law={folder / 'law'}"
    )
    with httpx.Client(base_url=address, timeout=60) as client:
        expected = ask(client).json()["choices"]
        with client.stream(
            "POST",
            "/v1/completions",
            json={"model": "math", "prompt": "x", "max_tokens": 40, "stream": True, "ignore_eos": True},
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "what was begun is finished"
    assert process.wait(timeout=60) == 0
    process, address = start(folder)
    with httpx.Client(base_url=address, timeout=60) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "law", "math"]
        assert ask(client).json()["choices"] == expected
        process.kill()
        process.wait()
        with pytest.raises(httpx.TransportError):
            ask(client)
    begin = time.monotonic()
    process, address = start(folder)
    assert time.monotonic() - begin < 60
    with httpx.Client(base_url=address, timeout=60) as client:
        assert ask(client).json()["choices"] == expected
    process.terminate()
    assert process.wait(timeout=60) == 0


MISTAKES = {
    "no base": ([], "--base is missing: expected a model, or --demo"),
    "no directory": (["--base", "nowhere"], "'nowhere'"),
    "an adapter without a path": (
        ["--base", "x", "--adapter", "math"],
        "--adapter 'math': expected NAME=DIR",
    ),
    "a path as a name": (["--base", "{model}", "--adapter", "../x={math}"], "adapter name '../x'"),
    "no adapter there": (["--base", "{model}", "--adapter", "x=nowhere"], "no such directory"),
    "an adapter of another base": (["--base", "{other}", "--adapter", "x={math}"], "other files than those"),
    "open to all": (["--base", "{model}", "--host", "0.0.0.0"], "there are no keys: give --keys FILE"),
    "a limit of nothing": (["--base", "x", "--rows", "0"], "--rows is 0: expected at least 1"),
    "a limit below zero": (
        ["--base", "x", "--queue-tokens", "-1"],
        "--queue-tokens is -1: expected at least 1",
    ),
    "more samples than rows": (
        ["--base", "x", "--rows", "2", "--samples", "4"],
        "--samples is 4: expected at most --rows 2",
    ),
    "more context than there is": (
        ["--base", "{model}", "--context", "600"],
        "--context is 600: expected 2 to the model's 512 positions",
    ),
    "more devices than there are": (["--base", "{model}", "--tensor", "99"], "--tensor is 99: expected 1 to"),
    "no port": (["--base", "x", "--port", "70000"], "port 70000 of '127.0.0.1' cannot be listened to"),
    "a name taken": (["--base", "{model}", "--adapter", "base={math}"], "give it another --name"),
}


@pytest.mark.sweep("open to all", "no port")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(folder, name, monkeypatch, capsys):
    import serve
    from milora_jax.commands.command_line import run_command
    from tests.models import write_hf_directory

    arguments, message = MISTAKES[name]
    other = folder / "other"
    if "{other}" in str(arguments) and not other.exists():
        write_hf_directory(other, seed=9)
    paths = {"model": folder / "model", "math": folder / "math", "other": other}
    given = [argument.format(**paths) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port=0", *given])
    monkeypatch.setattr("milora_jax.serving.loop.DeviceLoop.warm_up", lambda loop, decoding: None)
    with pytest.raises(SystemExit) as caught:
        run_command(serve.main)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in said
    assert len(said.splitlines()) == 1


def test_few_rows_need_no_other_flag():
    from milora_jax.serving.limits import Limits

    assert [Limits(rows=rows).most_samples for rows in (1, 2, 8)] == [1, 2, 4]
    assert Limits(rows=8, samples=8).most_samples == 8


def test_a_registry_is_kept_and_checked(folder, tmp_path):
    from milora_jax.errors import UserError
    from milora_jax.serving.registry import Registered, Registry

    path = tmp_path / "r.json"
    registry = Registry(path, {"math": Registered(folder / "math", pinned=True)})
    registry.note("math", False)
    again = Registry(path, {})
    assert again.get("math") == Registered(folder / "math", loaded=False, pinned=True)
    assert again.to_load() == {}
    for values, message in (
        ({}, "r.json: adapters: Field required"),
        ({"adapters": []}, "adapters: Input should be an object"),
        ({"adapters": {"a/b": {"path": "x"}}}, "adapters.a/b.*: String should match pattern"),
        ({"adapters": {"a": {}}}, "adapters.a.path: Field required"),
        ({"adapters": {"a": {"path": 3}}}, "adapters.a.path: Input should be a valid string"),
        ({"adapters": {"a": {"path": "x", "url": "y"}}}, "adapters.a.url: Unexpected keyword argument"),
        ({"adapters": {"a": {"path": "x", "loaded": 1}}}, "adapters.a.loaded: Input should be a valid bool"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            Registry(path, {})
