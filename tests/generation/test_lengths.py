"""Which prompts share an engine: few groups, every prompt in one, and never more to read than together."""

import itertools

import jax
import numpy as np
import pytest

from milora_jax.generation.lengths import LEAST_GAIN, Need, bucket_of, groups_by_length, position_cost
from tests.generation.decoding import DECODING
from tests.models import TINY


def read(group, rows, cost):
    """What decoding a group one step after another reads, in units of the weights."""
    width = min(rows, sum(need.samples for need in group))
    steps = max(*(n.steps for n in group), sum(n.samples * n.steps for n in group) / width)
    return steps * (1 + width * cost * max(need.positions for need in group))


@pytest.mark.parametrize("seed", range(8))
def test_groups_hold_everything_once_in_order_and_read_less(seed):
    rng = np.random.default_rng(seed)
    needs = [
        Need(int(2 ** rng.uniform(5, 12)), int(rng.integers(1, 4)), int(rng.integers(1, 300)))
        for _ in range(int(rng.integers(1, 40)))
    ]
    for rows, cost in itertools.product((1, 8), (0.0, 1e-5, 1e-3)):
        groups = groups_by_length(needs, rows, cost)
        order = [i for group in groups for i in group]
        assert sorted(order) == list(range(len(needs)))
        assert [needs[i].positions for i in order] == sorted(need.positions for need in needs)
        for one, two in itertools.pairwise(groups):
            ends = [bucket_of(needs[i].positions, 2**20) for i in (one[-1], two[0])]
            assert ends[0] < ends[1], "one program for each power of two at most"
        whole = read(needs, rows, cost)
        apart = sum(read([needs[i] for i in group], rows, cost) for group in groups)
        assert apart <= whole * (1 - LEAST_GAIN * (len(groups) - 1)) * (1 + 1e-9)
        if cost == 0:
            assert len(groups) == 1, "a cache that costs nothing is no reason to split"


def test_one_long_prompt_leaves_many_short_ones():
    short, long = Need(96, 1, 64), Need(2112, 1, 64)
    assert groups_by_length([short] * 10 + [long] * 2, 8, 9e-5) == [list(range(10)), [10, 11]]
    assert groups_by_length([long, short], 8, 9e-5) == [[1, 0]], "the two share a step's weights"
    assert groups_by_length([], 8, 9e-5) == []


def test_the_cost_of_a_position_is_that_of_its_bytes():
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(DECODING))
    assert position_cost(DECODING, TINY) == 2 * TINY.num_layers * 2 * 8 * 4 / weights
