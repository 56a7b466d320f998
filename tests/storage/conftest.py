"""Two models of one shape, a run on the first, and its adapter exported."""

import pytest

from milora_jax.storage import bucket_lock
from milora_jax.storage.export import export_milora
from tests.fake_gcs import in_reach
from tests.models import TINY, write_hf_directory
from tests.storage.adapters import run_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, TINY, tokenizer=False)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    write_hf_directory(folder, TINY, seed=1, tokenizer=False)
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A workdir whose best adapter is a MiLoRA."""
    folder = tmp_path_factory.mktemp("run")
    run_of(folder, model, "milora", alpha=6.0, pooler="attention")
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The MiLoRA of ``run``, exported."""
    out = tmp_path_factory.mktemp("exported") / "out"
    export_milora(run, out)
    return out


@pytest.fixture
def storage(monkeypatch):
    """A bucket that this process reaches."""
    with in_reach(monkeypatch, retries=4) as storage:
        yield storage


@pytest.fixture
def quick(monkeypatch):
    """A lock of a bucket that expires soon."""
    monkeypatch.setattr(bucket_lock, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(bucket_lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(bucket_lock, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(bucket_lock, "FRESH_SECONDS", 0.0)
