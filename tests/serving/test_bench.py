"""The load generator tells what became of every request."""

import json

import pytest

from milora_jax.bench.serve import main
from milora_jax.errors import UserError
from tests.serving.harness import KEYS


def test_a_report_counts_every_request(served, capsys, monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setenv(f"KEY_{name}", KEYS[name])
    more = ["--models", "math,base", "--key", "KEY_one,KEY_two", "--rate", "200", "--requests", "40"]
    main(["--url", served[1], *more, "--prompt", "20", "--new", "6"])
    report = json.loads(capsys.readouterr().out)
    served_ok, refused = report["statuses"]["200"], report["statuses"].get("429", 0)
    refused += report["statuses"].get("503", 0)
    assert served_ok + refused == report["requests"] == 40
    assert served_ok > 0
    assert report["unfinished"] == 0
    assert sum(tenant["served"] for tenant in report["by_tenant"].values()) == served_ok
    assert report["tokens_per_second"] == pytest.approx(6 * served_ok / report["seconds"])
    assert report["first_token_ms"]["p50"] <= report["whole_ms"]["p50"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:9", "--models", "x"], "no server at 'http://127.0.0.1:9'"),
        (["--models", "x", "--rate", "0"], "--rate is above 0"),
        (["--models", "x", "--key", "NOTHING_THERE"], "there is no such environment variable"),
        ([], "the following arguments are required: --models"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)
