"""The speed that is shown is that of steps, and of nothing else that happens between them."""

import json
import math

import pytest

from milora_jax.training.progress import Pace, Progress


class Clock:
    """Seconds that pass when they are told to."""

    now = 100.0

    def __call__(self):
        return self.now


def test_only_steps_are_counted():
    clock = Clock()
    pace = Pace(clock)
    pace.count(1000)
    clock.now += 60  # the compiler
    pace.start()
    assert pace.look() is None, "nothing has been measured yet"
    for _ in range(4):
        pace.count(50)
        clock.now += 0.5
    with pace.aside():
        clock.now += 30  # an evaluation
    pace.count(100)
    clock.now += 1
    assert pace.look() == 300 / 3
    pace.count(10)
    clock.now += 0.1
    assert round(pace.look()) == 100, "a look begins anew"


def test_an_evaluation_that_fails_is_not_counted_either():
    clock = Clock()
    pace = Pace(clock)
    try:
        with pace.aside():
            clock.now += 5
            raise ValueError
    except ValueError:
        pace.count(7)
        clock.now += 1
    assert pace.look() == 7


@pytest.mark.parametrize(
    ("first", "best", "last", "zeros", "saturated", "unlearned"),
    [
        (12.0, 5.0, 6.0, 0, "", ""),
        (12.0, 12.0, 12.0, 0, "", "no dev perplexity was below that before the first step, 12.000"),
        (
            12.0,
            400.0,
            400.0,
            0,
            "than a guess among 320",
            "than a guess among 320",
        ),
        (12.0, 319.99, 319.99, 9, "than a guess among 320", "no dev perplexity was below"),
        (12.0, 14.0, 14.0, 3, "the last 3 steps were exactly zero", "the last 3 steps were exactly zero"),
        (12.0, 1.0, 1.0, 9, "", ""),  # learned by heart
        (450.0, 438.0, 438.0, 0, "", ""),  # random weights
        (2766.0, 5960.0, 5960.0, 0, "than a guess among 320", "no dev perplexity was below"),
        (math.inf, 438.0, 438.0, 9, "", ""),  # a checkpoint of an older version
    ],
)
def test_what_is_certain_about_a_run_that_learned_nothing(first, best, last, zeros, saturated, unlearned):
    progress = Progress(
        first_perplexity=first, best_perplexity=best, last_perplexity=last, zero_gradients=zeros
    )
    for found, expected in ((progress.saturated(320), saturated), (progress.unlearned(320), unlearned)):
        assert expected in found
        assert bool(found) == bool(expected)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
