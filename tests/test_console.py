"""What commands say while they work."""

import io
import itertools
import re
import signal

import pytest

from milora_jax import console
from milora_jax.commands.command_line import Parser
from milora_jax.console import Console
from milora_jax.errors import Preempted
from milora_jax.preemption import stop_if_preempted, watch_for_preemption


def test_a_quick_load_says_nothing(capsys):
    with Console().loading("base") as progress:
        progress(2_000_000, 2_000_000)
    assert capsys.readouterr().err == ""


def test_less_than_a_megabyte_is_no_load(capsys, monkeypatch):
    monkeypatch.setattr(console, "SHOW_LOADING_AFTER", 0.0)
    with Console().loading("base") as progress:
        progress(999_999, 999_999)
    assert capsys.readouterr().err == ""


def test_a_long_load_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(console, "SHOW_LOADING_AFTER", 0.0)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    with Console().loading("base") as progress:
        progress(1_500_000, 4_000_000)
        progress(4_000_000, 4_000_000)
    assert capsys.readouterr().err.splitlines() == ["base 1/4 MB", "base 4/4 MB"]
    with Console(silent=True).loading("base") as progress:
        progress(4_000_000, 4_000_000)
    assert capsys.readouterr().err == "", "other processes than the first"


def test_lines_of_a_log_say_what_is_left_and_count_no_earlier_life(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
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
    monkeypatch.setattr(console.sys, "stderr", terminal)
    ticks = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks) / 20)
    with Console().progress("training", 100, "step") as bar:
        for done in (60, 61, 80):
            bar.reach(done, f"loss 0.{done}, 50 tokens/s")
    shown = terminal.getvalue()
    assert "60/100 [00:00<?" in shown, "the first report is no speed"
    assert re.search(r"80/100 \[00:00<00:0\d, .*step/s, loss 0.80, 50 tokens/s\]", shown), shown


def test_a_load_that_fails_ends_its_bar(monkeypatch):
    closed = []
    monkeypatch.setattr(console, "SHOW_LOADING_AFTER", 0.0)
    monkeypatch.setattr(console.ProgressBar, "close", lambda bar: closed.append(bar))
    with pytest.raises(OSError, match="gone"):
        _half()
    assert len(closed) == 1


def _half():
    with Console().loading("base") as progress:
        progress(1_000_000, 2_000_000)
        raise OSError("gone")


def test_the_help_of_an_option_names_its_default():
    parser = Parser(prog="x", description="What it does.\n\n    x --seed 1")
    parser.add_argument("word", nargs="?", default="w", help="a word")
    parser.add_argument("--seed", type=int, default=0, help="of rows")
    parser.add_argument("--sizes", default=[1, 2], help="in turns")
    parser.add_argument("--share", default="5%", help="at most 100%%")
    parser.add_argument("--told", default=3, help="default: the machine's")
    parser.add_argument("--flag", action="store_true", help="or not")
    parser.add_argument("--none", help="at all")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert {
        "x --seed 1",
        "word a word",
        "--seed SEED of rows (default: 0)",
        "--sizes SIZES in turns (default: 1,2)",
        "--share SHARE at most 100% (default: 5%)",
        "--told TOLD default: the machine's",
        "--flag or not",
        "--none NONE at all",
    } <= set(lines)


@pytest.fixture
def interruptible():
    """A job in the background ignores SIGINT: whoever runs the tests so too."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_is_asked_to_stop_where_nothing_is_lost(interruptible, number, capfd):
    with watch_for_preemption() as stopping:
        stop_if_preempted(stopping, "nothing happened")
        signal.raise_signal(number)
        assert capfd.readouterr().err.strip().startswith("stopping as soon as nothing is lost")
        with pytest.raises(Preempted, match="stopped while training: nothing is lost"):
            stop_if_preempted(stopping, "training")


def test_a_second_interrupt_stops_at_once(interruptible):
    with watch_for_preemption() as stopping:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stopping()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_that_ignores_interrupts_goes_on_ignoring_them(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with watch_for_preemption() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert not stopping()
