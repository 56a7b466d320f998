"""Weighted mixtures: the share of every source in an epoch, which examples are repeated, what is refused."""

from fractions import Fraction

import numpy as np
import pytest

from milora_jax.config import DataSection, parse_weights
from milora_jax.data.mixture import mixture, source_numbers
from milora_jax.data.packing import Rows
from milora_jax.data.sources import run_sources
from milora_jax.data.stored import ANSWERS, INDEX, TOKENS, StoredExamples, writing
from milora_jax.data.tokens import Example
from milora_jax.errors import UserError


def sources_of(*sizes):
    """As many examples of each source, one source after the other."""
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((10, 40), "a=2,b=1"),
        ((10, 40), "a=1,b=2"),
        ((7, 100, 3), "a=0.2,b=0.5,c=0.3"),
        ((5, 5), "a=1,b=1000"),
        ((3, 1), "a=1e-300,b=1e-300"),
    ],
)
def test_every_example_is_there_and_every_source_has_its_share(sizes, text):
    weights = parse_weights(text)
    exact = [Fraction(str(weight)) for weight in weights.values()]
    longest = max(size / weight for size, weight in zip(sizes, exact, strict=True))
    sources = sources_of(*sizes)
    chosen = mixture(sources, weights, seed=3)
    counts = np.bincount(chosen, minlength=len(sources))
    for place, (size, weight) in enumerate(zip(sizes, exact, strict=True)):
        own = counts[sources == place]
        assert abs(int(own.sum()) - longest * weight) <= Fraction(1, 2)
        assert own.min() >= 1
        assert own.max() - own.min() <= 1
        if size == longest * weight:
            assert own.max() == 1
    assert chosen[: len(sources)].tolist() == list(range(len(sources))), "first all of them, in their order"


def test_only_ratios_count_and_the_seed_chooses_who_is_repeated_once_more():
    sources = sources_of(10, 25)
    chosen = mixture(sources, {"a": 2.0, "b": 3.0}, 0)
    np.testing.assert_array_equal(chosen, mixture(sources, {"a": 4e300, "b": 6e300}, 0))
    others = [mixture(sources, {"a": 2.0, "b": 3.0}, seed) for seed in range(1, 6)]
    assert {len(other) for other in others} == {len(chosen)} == {25 + 17}
    assert any(not np.array_equal(chosen, other) for other in others)


def test_weights_that_are_the_sizes_are_no_weights():
    np.testing.assert_array_equal(
        mixture(sources_of(4, 9, 2), {"a": 4.0, "b": 9.0, "c": 2.0}, 1), np.arange(15)
    )


def test_sources_lie_in_any_order():
    """Held-out rows leave gaps, and the numbers are those of the examples themselves."""
    sources = np.array([1, 0, 1, 1, 0, 1], np.int32)
    assert sorted(mixture(sources, {"a": 1.0, "b": 1.0}, 0).tolist()) == [0, 1, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ((3, 0), {"a": 1.0, "b": 1.0}, "source 'b' has no training row left"),
        ((3, 3), {"a": 1.0, "b": 1e12}, r"an epoch with every row has 3e\+12 examples, expected at most"),
        ((3, 3), {"a": 1e-308, "b": 1e308}, "an epoch with every row has"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(sizes, weights, message):
    with pytest.raises(UserError, match=message):
        mixture(sources_of(*sizes), weights, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "data.weights is 'a': expected NAME=WEIGHT"),
        ("a=1,", "data.weights is '': expected NAME=WEIGHT"),
        ("=1", "data.weights is '=1'"),
        ("a=0", "data.weights is 'a=0': expected NAME=WEIGHT, a weight above 0"),
        ("a=-1", "data.weights is 'a=-1'"),
        ("a=1,b=nan", "data.weights is 'b=nan'"),
        ("a=inf", "data.weights is 'a=inf'"),
        ("a=much", "data.weights is 'a=much'"),
        ("a=1,a=2", "data.weights is 'a=1,a=2': expected 'a' once"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        DataSection(weights=text)
    assert str(caught.value).startswith(message)


def test_weights_name_every_training_source_and_no_other():
    for weights, expected in (("a=1,c=1", "names of data.train, a, b, not 'c'"), ("b=1", "a weight for 'a'")):
        with pytest.raises(UserError, match=expected):
            run_sources(DataSection(train="a=x.jsonl,b=y.jsonl", dev="c=z.jsonl", weights=weights))


def examples(lengths, names):
    return [
        Example(np.arange(length, dtype=np.int32), 1, name)
        for length, name in zip(lengths, names, strict=True)
    ]


def test_sources_are_read_alike_in_memory_and_in_files(tmp_path):
    listed = examples([3, 4, 5, 6], ["b", "a", "b", "c"])
    with writing(tmp_path, "train", ["a", "b", "c", "unused"]) as writer:
        for example in listed:
            writer.append(example)
    path = tmp_path / f"train{TOKENS}"
    index, answers = ((tmp_path / f"train{kind}").read_bytes() for kind in (INDEX, ANSWERS))
    stored = StoredExamples(path, index, answers, ["a", "b", "c", "unused"])
    for names in (["a", "b", "c"], ["c", "b", "a"]):
        numbers = source_numbers(listed, names)
        assert [names[number] for number in numbers] == ["b", "a", "b", "c"]
        np.testing.assert_array_equal(source_numbers(stored, names), numbers)


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("capacity", [None, 20])
def test_rows_hold_the_chosen_prompts_as_often_as_they_are_chosen(capacity, answers):
    listed = examples([3, 4, 5, 6, 2, 2], "aabbcc")
    chosen = np.array([0, 1, 2, 1, 1] if answers == 2 else [0, 1, 2, 3, 4, 5, 1, 1, 5], np.int32)
    rows = Rows(listed, capacity, answers, chosen)
    found = [example for row in rows for example in row]
    wanted = [listed[int(i) * answers + k] for i in chosen for k in range(answers)]
    assert sorted(map(id, found)) == sorted(map(id, wanted))
    assert rows.lengths.tolist() == [sum(len(example.tokens) for example in row) for row in rows]
    if capacity:
        assert rows.lengths.max() <= capacity < sum(rows.lengths)
        assert rows.prompts == max(len(row) for row in rows) // answers > 1
    places = {id(example): place for place, example in enumerate(listed)}
    for row in rows:
        found = [places[id(example)] for example in row]
        assert all(at % answers == place % answers for at, place in enumerate(found))
        assert all(found[at] == found[at - 1] + 1 for at in range(1, len(found)) if at % answers)
