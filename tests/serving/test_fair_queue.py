"""Whose turn it is: nobody is starved, whatever others do, and each one's own order is kept."""

import itertools

import numpy as np
import pytest

from milora_jax.serving.fair_queue import FairQueue


def popped(queue, count=None):
    found = []
    while (item := queue.pop()) is not None and (count is None or len(found) < count):
        found.append(item)
    return found


def test_one_tenant_is_served_in_order():
    queue = FairQueue()
    for i in range(10):
        queue.push("a", 1 + 1000 * (i % 2), i)
    assert popped(queue) == list(range(10))
    assert queue.pop() is None


def test_a_flood_does_not_starve_another():
    queue = FairQueue(quantum=100)
    for i in range(1000):
        queue.push("flood", 100, ("flood", i))
    queue.push("other", 100, ("other", 0))
    assert ("other", 0) in popped(queue, 3)


def test_tokens_are_shared_and_not_requests():
    queue = FairQueue(quantum=100)
    for i in range(300):
        queue.push("long", 1000, ("long", i))
        queue.push("short", 10, ("short", i))
    first = popped(queue, 202)
    spent = {name: sum(cost for tenant, _ in first if tenant == name) for name, cost in COSTS.items()}
    assert abs(spent["long"] - spent["short"]) <= 1000 + 100


COSTS = {"long": 1000, "short": 10}


def test_who_waits_for_an_adapter_does_not_hold_up_the_others():
    queue = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.push(item[0], 10, item)
    assert queue.pop(lambda item: item != "a1") == "a2"
    assert queue.pop(lambda item: item != "a1") == "b1"
    assert queue.pop(lambda item: item != "a1") is None
    assert popped(queue) == ["a1"]


def test_items_can_be_taken_out():
    queue = FairQueue()
    items = [object() for _ in range(4)]
    for item in items:
        queue.push("a", 1, item)
    assert queue.remove("a", items[1])
    assert not queue.remove("a", items[1])
    assert not queue.remove("b", items[0])
    assert len(queue) == 3
    assert queue.drain() == [items[0], items[2], items[3]]
    assert len(queue) == 0


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_doubled_or_overtaken(seed):
    rng, queue, number = np.random.default_rng(seed), FairQueue(quantum=100), itertools.count()
    waiting, served = {name: [] for name in "abc"}, {name: [] for name in "abc"}
    for _ in range(400):
        name = "abc"[rng.integers(3)]
        if rng.random() < 0.55:
            item = (name, next(number))
            queue.push(name, int(rng.integers(1, 500)), item)
            waiting[name].append(item)
        elif (item := queue.pop()) is not None:
            served[item[0]].append(item)
        elif waiting[name]:
            assert set(waiting[name]) == set(served[name])
    for item in popped(queue):
        served[item[0]].append(item)
    assert served == waiting
