"""Who is let in: every path but one needs a key, however it is spelt."""

import pytest

from milora_jax.errors import UserError
from milora_jax.serving.app import open_routes, routes
from milora_jax.serving.keys import Keyring
from milora_jax.serving.middleware import ADMIN_PATHS
from milora_jax.serving.registry import Registry
from milora_jax.serving.server import bound_socket, make_server
from tests.serving.harness import KEYS, client_of, raw, serving, status

ROUTES = {
    (method, route.path)
    for router in (open_routes, routes)
    for route in router.routes
    for method in route.methods
}
ROUTES |= {("GET", "/openapi.json")}


def test_every_route_but_one_needs_a_key(served):
    service, address, _ = served
    assert len(ROUTES) >= 12
    presented = {
        "none": [],
        "wrong": ["Authorization: Bearer nonsense-nonsense"],
        "upper case": [f"Authorization: Bearer {KEYS['one'].upper()}"],
        "beginning": [f"Authorization: Bearer {KEYS['one'][:-1]}"],
        "trailing": [f"Authorization: Bearer {KEYS['one']}x"],
        "two": [f"Authorization: Bearer {KEYS['one']}", f"Authorization: Bearer {KEYS['two']}"],
        "another scheme": [f"Authorization: Digest {KEYS['one']}"],
    }
    for method, path in ROUTES:
        for name, headers in presented.items():
            service.admission.wrong_keys.clear()
            found = status(raw(address, f"{method} {path} HTTP/1.1", "Host: localhost", *headers))
            assert found == (200 if path == "/health/live" else 401), (method, path, name)


def test_a_tenant_is_no_administrator(served):
    for path in ADMIN_PATHS:
        headers = ["Host: localhost", f"Authorization: Bearer {KEYS['one']}"]
        assert status(raw(served[1], f"POST {path} HTTP/1.1", *headers)) == 403


def test_what_each_key_may_ask_for(served):
    """The metrics name all tenants: a tenant cannot read them, and a monitor can read nothing else."""
    admin_only = {("POST", path) for path in ADMIN_PATHS}
    assert admin_only < ROUTES
    open_to = {"admin": ROUTES, "one": ROUTES - admin_only - {("GET", "/metrics")}}
    open_to["monitor"] = {("GET", "/metrics"), ("GET", "/health/ready"), ("GET", "/health/live")}
    for name, allowed in open_to.items():
        for method, path in ROUTES:
            headers = ["Host: localhost", f"Authorization: Bearer {KEYS[name]}"]
            found = status(raw(served[1], f"{method} {path} HTTP/1.1", *headers))
            assert (found != 403) == ((method, path) in allowed), (name, method, path, found)
            assert found != 401


@pytest.mark.parametrize(
    "target",
    [
        "//health/live",
        "/health/live/",
        "/health/live/../../v1/models",
        "/v1/models?/health/live",
        "/health/live%2f..%2f..%2fmetrics",
        "/HEALTH/LIVE",
        "/metrics#/health/live",
    ],
)
def test_no_other_spelling_is_the_open_path(served, target):
    served[0].admission.wrong_keys.clear()
    assert status(raw(served[1], f"GET {target} HTTP/1.1", "Host: localhost")) in (400, 401)


@pytest.mark.parametrize("host", ["a/?x", "a@b", "a b", "x\ty"])
def test_a_host_that_is_none_is_refused(served, host):
    headers = [f"Host: {host}", f"Authorization: Bearer {KEYS['one']}"]
    assert status(raw(served[1], "GET /v1/models HTTP/1.1", *headers)) == 400


def test_whoever_tries_keys_is_told_to_wait_and_others_are_not(served, client):
    served[0].admission.wrong_keys.clear()
    with client_of(served, "") as stranger:
        found = [stranger.get("/v1/models").status_code for _ in range(30)]
    assert 429 in found
    assert client.get("/v1/models").status_code == 200
    served[0].admission.wrong_keys.clear()


def test_a_server_without_keys_answers_to_its_own_names_alone(served):
    service, _, _ = served
    with serving(service, service_registry(service), Keyring(open=True)) as address:
        assert status(raw(address, "GET /v1/models HTTP/1.1", "Host: localhost")) == 200
        assert status(raw(address, "GET /v1/models HTTP/1.1", "Host: evil.example")) == 400
        headers = ["Host: localhost", "Content-Type: application/json", "Content-Length: 2"]
        assert status(raw(address, "POST /v1/load_lora_adapter HTTP/1.1", *headers, body=b"{}")) == 403


def service_registry(service):

    return Registry(None, {})


def test_other_addresses_are_refused_without_keys():
    with pytest.raises(UserError, match="is not this machine alone, and there are no keys"):
        bound_socket(Keyring(open=True), "0.0.0.0", 0)


def test_a_taken_port_is_told_before_anything_is_loaded(served):
    port = int(served[1].rpartition(":")[2])
    with pytest.raises(
        UserError, match=f"port {port} of '127.0.0.1' cannot be listened to: Address already in"
    ):
        bound_socket(Keyring(open=True), "127.0.0.1", port)


def test_of_two_that_load_at_the_same_time_the_second_is_told(served):
    first = bound_socket(Keyring(open=True), "127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, bound_socket(Keyring(open=True), "127.0.0.1", port) as second:
        first.listen()
        with pytest.raises(UserError, match=f"port {port} of '127.0.0.1' cannot be listened to"):
            make_server(served[0], Keyring(open=True), service_registry(served[0]), second)
