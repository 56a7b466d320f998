"""The Wilson interval, against its definition and against published values; and the paired bootstrap."""

import numpy as np
import pytest

from milora_jax.evaluation import statistics
from milora_jax.evaluation.statistics import Sample, paired_difference, wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (1, 3), (81, 263), (2035, 3270)])
def test_its_ends_are_where_the_score_test_just_rejects(correct, total):
    found = wilson_interval(correct, total)
    assert found.mean == correct / total
    assert 0 <= found.low <= found.mean <= found.high <= 1
    for end in {found.low, found.high} - {0.0, 1.0}:
        assert abs(found.mean - end) == pytest.approx(Z * (end * (1 - end) / total) ** 0.5, rel=1e-9)


def test_none_and_all_are_exact_ends():
    assert wilson_interval(0, 40).low == 0
    assert wilson_interval(40, 40).high == 1


def test_it_is_the_published_one():
    """Newcombe 1998, Table I, method 3."""
    for (correct, total), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        found = wilson_interval(correct, total)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def sample(values, weights=None):
    values = np.asarray(values, float)
    return Sample(values, np.ones(values.shape[1]) if weights is None else np.asarray(weights, float))


def test_the_difference_is_that_of_the_means_by_hand():
    """Losses: sums over rows, divided by tokens; the tasks count alike, whatever their rows."""
    tokens = [1.0, 3.0]
    ours = {"a": sample([[1.0, 3.0], [2.0, 2.0]], tokens), "b": sample([[5.0], [7.0]], [2.0])}
    theirs = {"a": sample([[1.0, 1.0], [1.0, 1.0]], tokens), "b": sample([[2.0], [2.0]], [2.0])}
    found = paired_difference(ours, theirs)
    # a: 4 / 4 of both seeds against 2 / 4; b: mean of 2.5 and 3.5 against 1.
    assert found.absolute.mean == pytest.approx((1.0 + 3.0) / 2 - (0.5 + 1.0) / 2)
    assert found.relative.mean == pytest.approx(2.0 / 0.75 - 1)


def test_every_draw_takes_seeds_with_all_their_tasks_and_rows_for_both_methods(monkeypatch):
    """Against rows and seeds that are really repeated."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    statistics._draws.cache_clear()
    rng = np.random.default_rng(3)
    tokens = {"a": rng.integers(1, 9, 5).astype(float), "b": rng.integers(1, 9, 4).astype(float)}
    ours, theirs = (
        {task: sample(rng.random((3, len(each))), each) for task, each in tokens.items()} for _ in range(2)
    )
    seeds, rows = statistics._draws(3, 0), [statistics._draws(5, 1), statistics._draws(4, 2)]
    assert (seeds.sum(axis=1) == 3).all()
    differences = []
    for draw in range(300):
        taken = np.repeat(np.arange(3), seeds[draw].astype(int))
        means = []
        for side in (ours, theirs):
            by_task = []
            for (_, each), counts in zip(side.items(), rows, strict=True):
                picked = np.repeat(np.arange(len(each.weights)), counts[draw].astype(int))
                by_task.append(each.values[np.ix_(taken, picked)].sum() / 3 / each.weights[picked].sum())
            means.append(np.mean(by_task))
        differences.append(means[0] - means[1])
    found = paired_difference(ours, theirs).absolute
    statistics._draws.cache_clear()
    np.testing.assert_allclose([found.low, found.high], np.percentile(differences, [2.5, 97.5]), atol=1e-6)


def test_one_seed_leaves_the_rows_of_which_the_error_is_known():
    correct = (np.arange(400) < 300).astype(float)
    found = paired_difference({"a": sample([correct])}, {"a": sample([np.zeros(400)])}).absolute
    half = Z * (0.75 * 0.25 / 400) ** 0.5
    assert found.mean == 0.75
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


@pytest.mark.thorough
@pytest.mark.parametrize(("by_seed", "by_row"), [(1.0, 0.1), (0.1, 1.0), (0.3, 1.0)])
def test_the_interval_covers_what_seeds_and_rows_vary(by_seed, by_row):
    """What all rows of a seed share, as all answers of one model do, is no noise that averages out; nor is
    what all seeds make of a row."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(100):
        drawn = 1 + by_seed * rng.normal(size=(10, 1)) + by_row * rng.normal(size=(1, 40))
        ours = {task: sample(drawn + by_row * rng.normal(size=(10, 40))) for task in "ab"}
        found = paired_difference(ours, {task: sample(np.zeros((10, 40))) for task in "ab"}).absolute
        assert found.low <= found.mean <= found.high
        covered.append(found.low <= 1.0 <= found.high)
    # Two tasks that share their noise are a little harder than one; row by row it would cover a quarter.
    assert np.mean(covered) >= 0.85


def test_the_same_of_both_is_no_difference_and_a_diverged_run_no_number():
    same = {"a": sample([[0.5, 1.0], [1.0, 2.0]])}
    assert set(vars(paired_difference(same, same).absolute).values()) == {0.0}
    assert paired_difference(same, same) == paired_difference(same, same)
    diverged = {"a": sample([[np.inf, 1.0], [1.0, 1.0]])}
    assert np.isnan(paired_difference(diverged, same).absolute.low)
    assert np.isnan(paired_difference(same, diverged).relative.mean)
