"""What is sent to a judge, and what a client makes of odd answers."""

import sys
from contextlib import closing

import pytest

from milora_jax.errors import UserError
from milora_jax.evaluation.judge_client import JudgeClient
from tests.evaluation.judges import Judge

pytest.importorskip("openai", reason="it asks the judge")


@pytest.mark.parametrize("key", ["sk-\nSECRET", "sk\u2013SECRET"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key):
    with pytest.raises(UserError, match="characters that no HTTP header can carry") as caught:
        JudgeClient("http://127.0.0.1:9/v1", "judge", key=key)
    assert "SECRET" not in str(caught.value)
    assert JudgeClient("http://127.0.0.1:9/v1", "judge", key="sk-1\n").key == "sk-1"


def test_an_answer_that_is_no_completion_is_one_line():
    with Judge({"no": "text"}).serving() as url, closing(JudgeClient(url, "judge")) as client:
        for _ in range(2):
            with pytest.raises(UserError, match="answers with something that is no chat completion"):
                client.ask([])


@pytest.mark.parametrize("key", ["", "sk-1"])
def test_only_the_key_that_is_given_is_sent(monkeypatch, key):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "SECRET")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    judge = Judge("[[5]]")
    with judge.serving() as url, closing(JudgeClient(url, "judge", key=key)) as client:
        assert client.ask([]) == "[[5]]"
    assert judge.asked[0][1] == (f"Bearer {key}" if key else None)
    assert "SECRET" not in str(judge.headers)


def test_a_judge_needs_the_openai_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"needs the package openai: pip install 'milora-jax\[eval\]'"):
        JudgeClient("http://127.0.0.1:9/v1", "judge")
