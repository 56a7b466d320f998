"""Objects of a bucket, and the lock of a workdir there: one holder, whatever the bucket answers."""

import json
import time

import pytest

from milora_jax.errors import Preempted, UserError, exit_report
from milora_jax.storage import bucket_lock
from milora_jax.storage.bucket import Bucket
from milora_jax.storage.bucket_lock import BucketLock
from milora_jax.storage.lock import WorkdirBusy
from tests.fake_gcs import BUCKET, CUT, LOST, RESET

pytest.importorskip("tensorstore")

RUN = "runs/math"
URL = f"gs://{BUCKET}/{RUN}"


@pytest.mark.parametrize("fault", [429, 503, RESET, LOST, CUT])
def test_passing_faults_are_retried(storage, fault):
    bucket = Bucket(URL)
    storage.failures = [fault, fault]
    generation = bucket.write("a/b", b"one" * 1000)
    storage.failures = [fault]
    assert bucket.read("a/b") == (b"one" * 1000, generation)
    storage.failures = [fault]
    assert bucket.names() == ["a/b"]
    storage.failures = [fault]
    assert bucket.write("a/b", None, generation) is not None
    assert bucket.read("a/b").content is None


@pytest.mark.parametrize(("status", "code"), [(429, 75), (503, 75), (RESET, 75), (LOST, 75), (403, 2)])
def test_a_fault_that_may_pass_asks_for_the_same_command_again(storage, status, code):
    """Supervisors restart a command that ends with 75 and no other that its user has to mend."""
    bucket = Bucket(URL)
    storage.fault = lambda method: status
    for request in (lambda: bucket.read("a"), lambda: bucket.write("a", b"one")):
        with pytest.raises(UserError) as caught:
            request()
        assert exit_report(caught.value).code == code


@pytest.mark.parametrize("fault", [0, LOST, RESET])
def test_a_write_is_conditional_on_a_generation(storage, fault):
    bucket = Bucket(URL)
    none = bucket.read("a").generation
    storage.failures = [fault] if fault else []
    first = bucket.write("a", b"one", none)
    assert first is not None
    assert bucket.write("a", b"two", none) is None
    storage.failures = [fault] if fault else []
    second = bucket.write("a", b"three", first)
    assert bucket.write("a", b"four", first) is None
    assert bucket.write("a", None, first) is None
    assert bucket.read("a") == (b"three", second)


def test_names_are_those_below_and_no_markers(storage):
    for name in ("checkpoints/2/x", "checkpoints/20/x", "checkpoints/2/", "", "best/2/x"):
        storage.objects[f"{RUN}/{name}"] = b"1"
    storage.objects["runs/math2/x"] = b"1"
    assert Bucket(f"{URL}/").names() == ["best/2/x", "checkpoints/2/x", "checkpoints/20/x"]
    assert Bucket(URL).names("checkpoints/2/") == ["checkpoints/2/x"]


def lock(lines=None, stop=lambda: False):
    return BucketLock(Bucket(URL), [].append if lines is None else lines.append, stop)


def test_a_locked_workdir_is_refused_while_its_holder_lives(storage, quick):
    lines = []
    with lock():
        held = json.loads(storage.objects[f"{RUN}/.lock"])
        with pytest.raises(WorkdirBusy, match=r"is in use by another run \(pid \d+ on host .*\)") as caught:
            lock(lines).__enter__()
        assert "\n" not in str(caught.value)
        assert held["run"] in str(caught.value)
    assert len(lines) == 1
    assert held["run"] in lines[0]
    assert f"{RUN}/.lock" not in storage.objects, "released"
    with lock(lines):
        assert len(lines) == 1


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"{}", b'{"run": "pid 1 on host gone"}'])
def test_a_lock_without_heartbeats_is_taken_over(storage, quick, content):
    storage.objects[f"{RUN}/.lock"] = content
    began = time.monotonic()
    with lock():
        assert time.monotonic() - began >= 0.4
        assert storage.generations[f"{RUN}/.lock"] > 1


def test_of_two_that_wait_for_a_dead_holder_one_gets_the_lock(storage, quick):
    storage.objects[f"{RUN}/.lock"] = b"dead"
    first, taken = lock(), []

    def other(method, name, done):
        if not done and not taken:  # just before the first one's write
            taken.append(True)
            storage.objects[f"{RUN}/.lock"] = b"another"
            storage.generations[f"{RUN}/.lock"] = 7

    storage.watch = other
    with pytest.raises(WorkdirBusy):
        first.__enter__()
    assert storage.objects[f"{RUN}/.lock"] == b"another"


def test_the_wait_for_a_lock_can_be_stopped(storage, quick):
    storage.objects[f"{RUN}/.lock"] = b"dead"
    with pytest.raises(Preempted, match="stopped while waiting for the lock of gs://"):
        lock(stop=lambda: True).__enter__()


def test_an_outage_is_no_evidence_against_a_holder(storage, quick, monkeypatch):
    monkeypatch.setattr(bucket_lock, "LEASE_SECONDS", 10.0)
    storage.objects[f"{RUN}/.lock"] = b"alive"
    now, read = [0.0], Bucket.read

    def slow(self, name):
        now[0] += 1000.0
        if now[0] > 5000:
            storage.generations[f"{RUN}/.lock"] = 2
        return read(self, name)

    monkeypatch.setattr(Bucket, "read", slow)
    monkeypatch.setattr(bucket_lock.time, "monotonic", lambda: now[0])
    with pytest.raises(WorkdirBusy):
        lock().__enter__()
