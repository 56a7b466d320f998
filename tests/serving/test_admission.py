"""Admission control: which requests are admitted, and which are refused with which status."""

import contextlib

import pytest

from milora_jax.serving.admission import WRONG_KEYS_PER_SECOND, AdmissionControl
from milora_jax.serving.api_errors import APIError
from milora_jax.serving.keys import LOCAL, Tenant
from milora_jax.serving.limits import Limits


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def status_of(entering):
    with pytest.raises(APIError) as caught, entering:
        pass
    return caught.value.status, caught.value.retry_after


def test_a_tenant_has_so_many_requests_at_a_time():
    admission, one, two = (
        AdmissionControl(Limits()),
        Tenant("one", concurrency=2),
        Tenant("two", concurrency=1),
    )
    with admission.admit(one), admission.admit(one):
        assert status_of(admission.admit(one)) == (429, 1)
        with admission.admit(two):
            assert admission.active_requests == 3
    with admission.admit(one), admission.admit(one):
        pass
    assert admission.active_requests == 0


def test_a_server_has_so_many_of_all():
    admission = AdmissionControl(Limits(rows=4, queue=1))
    many = [admission.admit(Tenant(f"t{i}")) for i in range(5)]
    for each in many:
        each.__enter__()
    assert status_of(admission.admit(Tenant("late"))) == (503, 1)
    for each in many:
        each.__exit__(None, None, None)
    with admission.admit(Tenant("late")):
        pass


def test_one_who_floods_leaves_places_to_others():
    admission, flood = AdmissionControl(Limits(rows=8, queue=64)), Tenant("flood", concurrency=1000)
    with contextlib.ExitStack() as stack:
        had = 0
        with contextlib.suppress(APIError):
            for _ in range(1000):
                stack.enter_context(admission.admit(flood))
                had += 1
        assert had == 58, "of 72: four for each of those that are left"
        assert status_of(admission.admit(flood)) == (429, 1)
        for _ in range(10):
            stack.enter_context(admission.admit(Tenant("one")))
        assert status_of(admission.admit(Tenant("flood"))) == (429, 1)
        stack.enter_context(admission.admit(Tenant("two")))
    assert admission.active_requests == 0


def test_one_who_is_alone_is_bounded_by_the_queue_and_nothing_else():
    admission = AdmissionControl(Limits(rows=2, queue=70))
    with contextlib.ExitStack() as stack:
        for _ in range(72):
            stack.enter_context(admission.admit(LOCAL))
        with pytest.raises(APIError, match="--rows 2 decode, --queue 70 wait") as caught:
            stack.enter_context(admission.admit(LOCAL))
        assert caught.value.status == 503
    admission = AdmissionControl(Limits(queue_tokens=100))
    with admission.queue_prompt(LOCAL, 60), admission.queue_prompt(LOCAL, 40):
        assert status_of(admission.queue_prompt(LOCAL, 1)) == (503, 1)


def test_a_tenant_without_a_limit_still_leaves_places_to_others():
    admission, flood = AdmissionControl(Limits(rows=8, queue=64)), Tenant("flood", concurrency=0)
    with contextlib.ExitStack() as stack:
        for _ in range(58):
            stack.enter_context(admission.admit(flood))
        with pytest.raises(APIError, match="the rest is left to others"):
            stack.enter_context(admission.admit(flood))


def test_long_prompts_that_wait_are_counted_and_one_is_always_let_in():
    admission, one, two = AdmissionControl(Limits(queue_tokens=100)), Tenant("one"), Tenant("two")
    with admission.queue_prompt(one, 1000):
        assert status_of(admission.queue_prompt(two, 1)) == (503, 1)
    with admission.queue_prompt(one, 60), admission.queue_prompt(two, 40):
        assert status_of(admission.queue_prompt(one, 1)) == (503, 1)
    with admission.queue_prompt(one, 60), admission.queue_prompt(one, 20):
        assert status_of(admission.queue_prompt(one, 1)) == (429, 1)
        with admission.queue_prompt(two, 20):
            assert admission.queued_tokens == 100
    assert admission.queued_tokens == 0


def test_nothing_is_admitted_once_it_is_closed():
    admission = AdmissionControl(Limits())
    admission.closed = True
    assert status_of(admission.admit(Tenant("one"))) == (503, 1)


def test_tokens_come_back_with_time():
    clock = Clock()
    admission, tenant = AdmissionControl(Limits(), clock), Tenant("one", tokens_per_minute=600)
    admission.spend_tokens(tenant, 600)
    with pytest.raises(APIError, match="tokens_per_minute 600"):
        admission.spend_tokens(tenant, 1)
    clock.now += 30
    admission.spend_tokens(tenant, 300)
    with pytest.raises(APIError):
        admission.spend_tokens(tenant, 1)
    clock.now += 3600
    admission.spend_tokens(tenant, 5000)  # more than a bucket holds is given when it is full
    admission.spend_tokens(Tenant("two"), 10**9)


def test_an_address_with_many_wrong_keys_is_told_to_wait():
    clock = Clock()
    admission = AdmissionControl(Limits(), clock)
    for _ in range(WRONG_KEYS_PER_SECOND):
        admission.count_wrong_key("1.2.3.4")
    with pytest.raises(APIError) as caught:
        admission.count_wrong_key("1.2.3.4")
    assert caught.value.status == 429
    admission.count_wrong_key("5.6.7.8")
    clock.now += 1
    admission.count_wrong_key("1.2.3.4")


def test_a_flood_of_addresses_takes_no_memory():
    admission = AdmissionControl(Limits())
    for i in range(5000):
        admission.count_wrong_key(str(i))
    assert len(admission.wrong_keys) <= 4096
