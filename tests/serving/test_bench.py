"""The load generator tells what became of every request; the model that is served for it is a whole one."""

import dataclasses
import json

import pytest

from milora_jax.bench import files, overhead
from milora_jax.bench.serve import latencies, report
from milora_jax.bench.traffic import Asking, Outcome
from milora_jax.commands.bench import main
from milora_jax.errors import UserError
from tests.serving.harness import KEYS

SMALL = ["--prompt", "20", "--new", "6"]


@pytest.fixture
def keys(monkeypatch):
    for name in ("one", "two", "monitor"):
        monkeypatch.setenv(f"KEY_{name}", KEYS[name])
    return "KEY_one,KEY_two"


def run(capsys, served, *more):
    main(["serve", "--url", served[1], "--models", "math,base", *SMALL, *more])
    return json.loads(capsys.readouterr().out)


@pytest.mark.thorough
def test_requests_that_do_not_wait(served, capsys, keys):
    more = ["--rate", "200", "--requests", "40", "--whole", "0.3", "--watch-key", "KEY_monitor"]
    found = run(capsys, served, "--key", keys, *more)
    refused = found["statuses"].get("429", 0) + found["statuses"].get("503", 0)
    assert found["complete"] + refused == found["requests"] == 40
    assert found["complete"] > 0
    assert found["broken"] == found["doubled"] == found["questions_with_several_answers"] == 0
    tenants = found["by_tenant"].values()
    assert sum(tenant["complete"] for tenant in tenants) == found["complete"]
    assert sum(tenant["refused"] for tenant in tenants) == refused
    assert found["tokens_per_second"] == pytest.approx(6 * found["complete"] / found["seconds"])
    assert found["first_token_ms"]["p50"] > 0
    assert found["whole_ms"]["p50"] > 0
    assert found["idle_after_s"] is not None
    assert found["server"]["memory_mb"]["after"] > 10
    assert run(capsys, served, "--key", keys, *more[:4])["server"] == {}, "a tenant is not told"


@pytest.mark.thorough
def test_clients_who_wait_and_those_who_leave(served, capsys, keys):
    more = ["--clients", "4", "--requests", "40", "--questions", "5"]
    found = run(capsys, served, "--key", "KEY_one", *more)
    assert found["complete"] == 40
    assert found["questions"] <= 5
    assert found["questions_with_several_answers"] == 0
    found = run(capsys, served, "--key", "KEY_one", *more, "--leave", "0.5", "--leave-within", "0.05")
    assert found["left"] > 0
    assert found["complete"] + found["left"] == 40


@pytest.mark.thorough
def test_more_than_the_server_can_do(served, capsys, keys):
    more = ["--clients", "4", "--requests", "16", "--overload", "5", "--seconds", "1"]
    found = run(capsys, served, "--key", "KEY_one", *more)
    assert found["capacity"]["complete"] == 16
    assert found["rate"] == pytest.approx(5 * found["capacity"]["complete_per_second"])
    assert set(found["statuses"]) <= {"200", "429", "503"}
    assert sum(found["statuses"].values()) == found["requests"]


def test_latencies_of_streamed_and_whole_answers():
    streamed = Outcome(Asking(0, "", 0, {}), 200, first=0.3, whole=0.5, between=[0.1, 0.1])
    whole = Outcome(Asking(0, "", 1, {}), 200, whole=0.1)
    found = latencies([streamed, whole])
    assert found["first_token_ms"]["p50"] == pytest.approx(300), "a whole answer has no first token"
    assert found["whole_ms"]["p50"] == pytest.approx(300)
    assert found["between_pieces_ms"]["p99"] == pytest.approx(100)


def test_a_request_that_ends_twice_or_never_is_told():
    asking = Asking(0, "", 0, {})
    outcomes = [
        Outcome(asking, 200, ends=1, identity="a", answer="x"),
        Outcome(asking, 200, ends=1, identity="a", answer="y"),
        Outcome(asking, 200, ends=2, identity="b"),
        Outcome(asking, 200, ends=0, identity="c"),
        Outcome(asking, 0),
    ]
    found = report(outcomes, 1.0)
    assert (found["complete"], found["broken"], found["doubled"]) == (2, 2, 2)
    assert found["questions_with_several_answers"] == 1
    assert found["statuses"] == {"0": 1, "200": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:9", "--models", "x"], "no server at 'http://127.0.0.1:9'"),
        (["--models", "x", "--rate", "0"], "--rate and --seconds are above 0"),
        (["--models", "x", "--key", "NOTHING_THERE"], "there is no such environment variable"),
        (["--models", "x", "--watch-key", "NOTHING_THERE"], "--watch-key 'NOTHING_THERE': there is no such"),
        (["--models", "x", "--leave", "2"], "--leave is a share"),
        (["--models", "x", "--overload", "10"], "--overload needs --clients"),
        ([], "the following arguments are required: --models"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["serve", *arguments])


@pytest.mark.thorough
def test_a_random_model_with_a_tokenizer_of_all_its_words(tmp_path, capsys, monkeypatch):
    """And with adapters: all that the engine beside a server needs."""
    from milora_jax.data.tokens import load_tokenizer
    from tests.models import TINY

    monkeypatch.setitem(files.SHAPES, "tiny", dataclasses.replace(TINY, vocab_size=400))
    into = tmp_path / "served"
    main(["files", "--into", str(into), "--shape", "tiny", "--rank", "8", "--adapters", "2"])
    written = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(written["model"])
    texts = [tokenizer.decode([i]) for i in range(4, 400)]
    assert all(texts)
    with pytest.raises(UserError, match="exists: expected a new directory"):
        main(["files", "--into", str(into), "--shape", "tiny"])
    with pytest.raises(UserError, match="expected NAME=DIR"):
        main(["overhead", "--model", written["model"], "--adapters", "x"])
    places = ",".join(f"a{i}={path}" for i, path in enumerate(written["adapters"]))
    sizes = ["--context", "64", "--prompt", "8", "--new", "4", "--rows", "2"]
    more = ["--adapters", places, "--url", "http://127.0.0.1:9", *sizes]
    with pytest.raises(UserError, match="--requests is 7: expected a multiple of the 2 batch slots"):
        main(["overhead", "--model", written["model"], *more, "--requests", "7"])
    with pytest.raises(UserError, match=r"--requests is 4: expected .* at least 6"):
        main(["overhead", "--model", written["model"], *more, "--requests", "4"])
    more += ["--requests", "6"]
    with pytest.raises(UserError, match="no server at"):
        main(["overhead", "--model", written["model"], *more])


def test_a_rate_is_that_of_the_time_in_which_all_slots_are_in_use():
    # Two slots: the first answers end at 3 and 4 s, the last two at 9 and 20 s: four of ten tokens between.
    ends = [20.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert overhead.rate_of_full_slots(ends, rows=2, new=10) == 4 * 10 / (8.0 - 4.0)
    # Two at a time, every two seconds, as the engine ends them.
    assert overhead.rate_of_full_slots([2.0, 2.0, 4.0, 4.0, 6.0, 6.0], rows=2, new=10) == 2 * 10 / 2.0


@pytest.mark.thorough
def test_a_server_beside_its_engine(served, capsys, keys):
    _, address, folder = served
    sizes = ["--context", "96", "--requests", "12", "--new", "6", "--rows", "4", "--slots", "2"]
    more = ["--adapters", f"math={folder / 'math'}", "--url", address, "--key", "KEY_one"]
    repeats = ["--firsts", "1", "--repeats", "5"]
    main(["overhead", "--model", str(folder / "model"), *sizes, "--prompt", "20", *more, *repeats])
    found = json.loads(capsys.readouterr().out)
    assert set(found["cases"]) == {"engine, one adapter", "engine, bank", "server"}
    assert all(case["tokens_per_second"] > 0 for case in found["cases"].values())
    assert found["cases"]["server"]["server_over_it"] == 1.0
