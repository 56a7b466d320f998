"""Who is let in, and who is told to come again."""

import contextlib

import pytest

from milora_jax.serving.door import BAD_KEYS_PER_SECOND, Door
from milora_jax.serving.keys import LOCAL, Tenant
from milora_jax.serving.limits import Limits
from milora_jax.serving.refusal import Refusal


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def status_of(entering):
    with pytest.raises(Refusal) as caught, entering:
        pass
    return caught.value.status, caught.value.retry_after


def test_a_tenant_has_so_many_requests_at_a_time():
    door, one, two = Door(Limits()), Tenant("one", concurrency=2), Tenant("two", concurrency=1)
    with door.entered(one), door.entered(one):
        assert status_of(door.entered(one)) == (429, 1)
        with door.entered(two):
            assert door.under_way == 3
    with door.entered(one), door.entered(one):
        pass
    assert door.under_way == 0


def test_a_server_has_so_many_of_all():
    door = Door(Limits(rows=4, queue=1))
    many = [door.entered(Tenant(f"t{i}")) for i in range(5)]
    for each in many:
        each.__enter__()
    assert status_of(door.entered(Tenant("late"))) == (503, 1)
    for each in many:
        each.__exit__(None, None, None)
    with door.entered(Tenant("late")):
        pass


def test_one_who_floods_leaves_places_to_others():
    door, flood = Door(Limits(rows=8, queue=64)), Tenant("flood", concurrency=1000)
    with contextlib.ExitStack() as stack:
        had = 0
        with contextlib.suppress(Refusal):
            for _ in range(1000):
                stack.enter_context(door.entered(flood))
                had += 1
        assert had == 58, "of 72: four for each of those that are left"
        assert status_of(door.entered(flood)) == (429, 1)
        for _ in range(10):
            stack.enter_context(door.entered(Tenant("one")))
        assert status_of(door.entered(Tenant("flood"))) == (429, 1)
        stack.enter_context(door.entered(Tenant("two")))
    assert door.under_way == 0


def test_one_who_is_alone_is_bounded_by_the_queue_and_nothing_else():
    door = Door(Limits(rows=2, queue=70))
    with contextlib.ExitStack() as stack:
        for _ in range(72):
            stack.enter_context(door.entered(LOCAL))
        with pytest.raises(Refusal, match="--rows 2 decode, --queue 70 wait") as caught:
            stack.enter_context(door.entered(LOCAL))
        assert caught.value.status == 503
    door = Door(Limits(queue_tokens=100))
    with door.waiting(LOCAL, 60), door.waiting(LOCAL, 40):
        assert status_of(door.waiting(LOCAL, 1)) == (503, 1)


def test_a_tenant_without_a_limit_still_leaves_places_to_others():
    door, flood = Door(Limits(rows=8, queue=64)), Tenant("flood", concurrency=0)
    with contextlib.ExitStack() as stack:
        for _ in range(58):
            stack.enter_context(door.entered(flood))
        with pytest.raises(Refusal, match="the rest is left to others"):
            stack.enter_context(door.entered(flood))


def test_long_prompts_that_wait_are_counted_and_one_is_always_let_in():
    door, one, two = Door(Limits(queue_tokens=100)), Tenant("one"), Tenant("two")
    with door.waiting(one, 1000):
        assert status_of(door.waiting(two, 1)) == (503, 1)
    with door.waiting(one, 60), door.waiting(two, 40):
        assert status_of(door.waiting(one, 1)) == (503, 1)
    with door.waiting(one, 60), door.waiting(one, 20):
        assert status_of(door.waiting(one, 1)) == (429, 1)
        with door.waiting(two, 20):
            assert door.waiting_tokens == 100
    assert door.waiting_tokens == 0


def test_a_closed_door_lets_nobody_in():
    door = Door(Limits())
    door.closed = True
    assert status_of(door.entered(Tenant("one"))) == (503, 1)


def test_tokens_come_back_with_time():
    clock = Clock()
    door, tenant = Door(Limits(), clock), Tenant("one", tokens_per_minute=600)
    door.spend(tenant, 600)
    with pytest.raises(Refusal, match="tokens_per_minute 600"):
        door.spend(tenant, 1)
    clock.now += 30
    door.spend(tenant, 300)
    with pytest.raises(Refusal):
        door.spend(tenant, 1)
    clock.now += 3600
    door.spend(tenant, 5000)  # more than a bucket holds is given when it is full
    door.spend(Tenant("two"), 10**9)


def test_an_address_with_many_wrong_keys_is_told_to_wait():
    clock = Clock()
    door = Door(Limits(), clock)
    answers = [door.wrong_key("1.2.3.4") for _ in range(BAD_KEYS_PER_SECOND + 1)]
    assert answers[:-1] == [None] * BAD_KEYS_PER_SECOND
    assert answers[-1].status == 429
    assert door.wrong_key("5.6.7.8") is None
    clock.now += 1
    assert door.wrong_key("1.2.3.4") is None


def test_a_flood_of_addresses_takes_no_memory():
    door = Door(Limits())
    for i in range(5000):
        door.wrong_key(str(i))
    assert len(door._mistakes) <= 4096
