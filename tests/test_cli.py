"""What commands say while they work."""

import io
import re

import pytest

from milora_jax import cli
from milora_jax.cli import Console


def test_a_quick_load_says_nothing(capsys):
    with Console().loading("base") as progress:
        progress(2_000_000, 2_000_000)
    assert capsys.readouterr().err == ""


def test_a_long_load_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(cli, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(cli, "LINE_EVERY", 0.0)
    with Console().loading("base") as progress:
        progress(1_500_000, 4_000_000)
        progress(4_000_000, 4_000_000)
    assert capsys.readouterr().err.splitlines() == ["base 1/4 MB", "base 4/4 MB"]
    with Console(silent=True).loading("base") as progress:
        progress(4_000_000, 4_000_000)
    assert capsys.readouterr().err == "", "other processes than the first"


def test_lines_of_a_log_say_what_is_left_and_count_no_earlier_life(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli, "LINE_EVERY", 0.0)
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    with Console().progress("training", 100, "step") as bar:
        for seconds, done, loss in ((500, 60, "0.900"), (501, 70, ""), (504, 100, "0.500")):
            now[0] = float(seconds)
            bar.reach(done, f"loss {loss}, 50 tokens/s" if loss else "")
    assert capsys.readouterr().err.splitlines() == [
        "training 60/100 step: loss 0.900, 50 tokens/s",
        "training 70/100 step: loss 0.900, 50 tokens/s, 0:00:03 left",
        "training 100/100 step: loss 0.500, 50 tokens/s",
    ]


def test_a_bar_on_a_terminal_shows_status_and_time_left(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(cli.sys, "stderr", terminal)
    with Console().progress("training", 100, "step") as bar:
        for done in (60, 61, 80):
            bar.reach(done, f"loss 0.{done}, 50 tokens/s")
    shown = terminal.getvalue()
    assert "60/100 [00:00<?" in shown, "the first report is no speed"
    assert re.search(r"80/100 \[00:00<00:0\d, .*step/s, loss 0.80, 50 tokens/s\]", shown), shown


def test_a_load_that_fails_ends_its_bar(monkeypatch):
    closed = []
    monkeypatch.setattr(cli, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(cli.Bar, "close", lambda bar: closed.append(bar))
    with pytest.raises(OSError, match="gone"):
        _half()
    assert len(closed) == 1


def _half():
    with Console().loading("base") as progress:
        progress(1, 2)
        raise OSError("gone")
