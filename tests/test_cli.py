"""What commands say while they work."""

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
