"""Many clients, too many, and those who leave: nothing is lost, doubled or left behind."""

import json
import resource

import pytest

from milora_jax.commands.bench import main
from tests.serving.harness import KEYS


@pytest.fixture
def load(served, capsys, monkeypatch):
    for name in ("many", "monitor"):
        monkeypatch.setenv(f"KEY_{name}", KEYS[name])

    def run(*more):
        sizes = ["--prompt", "20", "--key", "KEY_many", "--watch-key", "KEY_monitor"]
        main(["serve", "--url", served[1], "--models", "math,law,art,base", *sizes, *more])
        return json.loads(capsys.readouterr().out)

    return run


def in_order(found):
    """Whatever was asked for: every request has one end, and the server nothing left of it."""
    assert found["broken"] == found["doubled"] == found["questions_with_several_answers"] == 0
    assert set(found["statuses"]) <= {"200", "429", "503"}
    assert sum(found["statuses"].values()) + found["left"] == found["requests"]
    assert found["idle_after_s"] < 5
    server = found["server"]
    assert server["tasks"]["after"] <= server["tasks"]["before"]
    assert server["files"]["after"] <= server["files"]["before"]
    assert server["compiled"]["after"] == server["compiled"]["before"]
    return server["memory_mb"]["after"] - server["memory_mb"]["before"]


def leave(load, count):
    """Clients who go away, before and after the first token, among some who stay."""
    more = ["--leave", "0.8", "--leave-within", "0.3", "--new", "60", "--whole", "0.4"]
    found = load("--clients", "20", "--requests", str(count), *more)
    in_order(found)
    assert found["left"] > count // 4


@pytest.mark.thorough
def test_fifty_who_leave_leave_nothing_behind(load):
    leave(load, 70)


@pytest.mark.slow
def test_five_hundred_who_leave_leave_nothing_behind(load):
    leave(load, 700)


@pytest.mark.thorough
def test_clients_by_the_dozen(load):
    found = load("--clients", "32", "--requests", "200", "--questions", "20", "--whole", "0.5", "--new", "8")
    in_order(found)
    assert found["complete"] == 200


@pytest.mark.slow
def test_two_hundred_clients_and_two_thousand_requests(load):
    found = load("--clients", "200", "--requests", "2000", "--whole", "0.5")
    in_order(found)
    assert found["complete"] == 2000


@pytest.mark.slow
def test_ten_times_too_many_for_a_minute(load):
    """In one process with the server, this program counts in its memory as well."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = load("--clients", "8", "--requests", "100", "--overload", "10", "--seconds", "60")
    in_order(found)
    assert found["statuses"]["429"] + found["statuses"].get("503", 0) > found["complete"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "kilobytes: 256 MB"
