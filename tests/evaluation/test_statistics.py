"""The Wilson interval, against its definition and against published values."""

import pytest

from milora_jax.evaluation.statistics import wilson_interval

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
