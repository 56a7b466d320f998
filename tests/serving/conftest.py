"""One server for all tests of a process that ask one."""

import json

import pytest

from milora_jax.serving.keys import Keyring
from tests.serving.harness import client_of, digest, running, service_of, serving, write_model


@pytest.fixture(scope="session")
def ring(tmp_path_factory):
    tenants = [
        {"name": "one", "sha256": digest("one"), "adapters": ["math", "base"], "concurrency": 20},
        {"name": "two", "sha256": digest("two"), "concurrency": 2},
        {"name": "many", "sha256": digest("many"), "concurrency": 10**6},
    ]
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    others = {"admin": [digest("admin")], "monitor": [digest("monitor")]}
    path.write_text(json.dumps({"tenants": tenants, **others}))
    return Keyring.of(path, {})


@pytest.fixture(scope="session")
def served(tmp_path_factory, ring):
    """A service behind a server, its address, and the folder with its registry."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("served")
    adapters = write_model(folder)
    service, registry = service_of(folder, adapters, path=folder / "registry.json")
    with running(service), serving(service, registry, ring) as address:
        yield service, address, folder


@pytest.fixture
def client(served):
    with client_of(served, "one") as client:
        yield client
