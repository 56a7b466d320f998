"""A workdir in a bucket has whole steps or none, and one line for everything else."""

import time
from pathlib import Path

import numpy as np
import pytest

from milora_jax.addresses import in_bucket
from milora_jax.errors import UserError, as_given
from milora_jax.storage import bucket_lock
from milora_jax.storage.checkpoint import CheckpointDirectory, verify_step
from milora_jax.storage.files import require_new
from milora_jax.storage.lock import WorkdirLock
from milora_jax.storage.manifest import MANIFEST
from milora_jax.storage.mirror import fetched, local_copy, opened_workdir, synced
from tests.fake_gcs import BUCKET

pytest.importorskip("tensorstore")

RUN = "runs/math"
URL = f"gs://{BUCKET}/{RUN}"


def opened(lines=None):
    return opened_workdir(URL, [].append if lines is None else lines.append)


def directory(workdir, name="checkpoints", keep=2, warn=print):
    return CheckpointDirectory(workdir.path / name, keep, warn, workdir.mirror)


def tree(seed):
    return {"a": np.random.default_rng(seed).normal(size=(64, 8)).astype(np.float32)}


def save(workdir, *steps, keep=2):
    found = directory(workdir, keep=keep)
    for step in steps:
        found.save(step, tree(step), {"step": step})
        found.wait()


def steps_in(storage, folder="checkpoints"):
    names = [name.removeprefix(f"{RUN}/{folder}/") for name in storage.objects if f"/{folder}/" in name]
    return sorted({int(name.split("/")[0]) for name in names})


def one_line(caught):
    assert "\n" not in str(caught.value)
    return as_given(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://", "expected gs://BUCKET/PATH"),
        (f"gs://{BUCKET}", "expected gs://BUCKET/PATH"),
        (f"gs://{BUCKET}/", "expected gs://BUCKET/PATH"),
        ("gs:/x/y", "expected gs://BUCKET/PATH"),
        ("gs://no-such-bucket/x", "gs://no-such-bucket/x/.lock cannot be written: NOT_FOUND: The specified"),
    ],
)
def test_what_is_no_bucket_is_one_line(storage, url, message):
    with pytest.raises(UserError, match=message) as caught, opened_workdir(url, print):
        pass
    one_line(caught)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [("read_only", "cannot be written: .*storage.objects.create"), ("refuse", "cannot be read: .*403")],
)
def test_a_bucket_without_the_right_to_write_is_one_line_before_anything_is_read(storage, refusal, message):
    storage.objects[f"{RUN}/config.json"] = b"{}"
    setattr(storage, refusal, 403)
    with pytest.raises(UserError, match=message) as caught, opened():
        pass
    assert "http_response_body" not in one_line(caught)
    assert not storage.asked or {name for name, _ in storage.asked} == {f"{RUN}/.lock"}


def test_a_holder_that_lost_its_lock_writes_nothing_more(storage, quick, monkeypatch):
    monkeypatch.setattr(bucket_lock, "HEARTBEAT_SECONDS", 1000.0)
    with opened() as workdir:
        save(workdir, 1)
        storage.objects[f"{RUN}/.lock"] = b"another"
        storage.generations[f"{RUN}/.lock"] = 7
        with pytest.raises(UserError, match="was taken over by another run"):
            save(workdir, 2)
        assert steps_in(storage) == [1]
        (workdir.path / "metrics.jsonl").write_text("{}")
        with pytest.raises(UserError, match="was taken over by another run"):
            workdir.mirror.sync()
        (workdir.path / "metrics.jsonl").unlink()
    assert f"{RUN}/metrics.jsonl" not in storage.objects
    assert storage.objects[f"{RUN}/.lock"] == b"another", "left to its holder"


def test_a_run_of_steps_is_in_the_bucket_and_comes_back(storage):
    with opened() as workdir:
        (workdir.path / "config.json").write_text("{}")
        save(workdir, 1, 2, 3)
    assert steps_in(storage) == [2, 3]
    assert f"{RUN}/.lock" not in storage.objects
    with opened() as workdir:
        assert (workdir.path / "config.json").read_text() == "{}"
        found = directory(workdir)
        assert (found.steps(), found.newest()) == ([2, 3], 3)
        save(workdir, 3, 4)
    assert steps_in(storage) == [3, 4]


def test_a_copy_of_the_bucket_is_a_workdir(storage, tmp_path):
    with opened() as workdir:
        save(workdir, 5)
    verify_step(storage.download(RUN, tmp_path) / "checkpoints/5")


def test_the_manifest_comes_last_and_goes_first(storage):
    with opened() as workdir:
        (workdir.path / "metrics.jsonl").write_text("{}\n")
        save(workdir, 1, 2, keep=1)
    step = f"{RUN}/checkpoints/1/"
    uploads = [name for method, name in storage.written if method == "POST" and name.startswith(step)]
    assert uploads[-1] == f"{step}{MANIFEST}"
    assert len(uploads) == 3, "arrays, metadata, manifest"
    deletions = [name for method, name in storage.written if method == "DELETE" and name.startswith(step)]
    assert deletions[0] == f"{step}{MANIFEST}"
    assert len(deletions) == len(uploads)
    order = [name for _, name in storage.written]
    assert order.index(f"{RUN}/metrics.jsonl") < order.index(f"{step}{MANIFEST}"), "logs come before the step"


def test_an_interrupted_upload_does_not_exist(storage):
    with opened() as workdir:
        save(workdir, 1, 2)
    whole = dict(storage.objects)
    files = sorted(name for name in whole if "/checkpoints/2/" in name and not name.endswith(MANIFEST))
    for count in range(len(files) + 1):
        storage.objects = {
            name: content for name, content in whole.items() if "/checkpoints/2/" not in name
        } | {name: whole[name] for name in files[:count]}
        with fetched(URL, states=True) as copy:
            warned = []
            assert CheckpointDirectory(copy / "checkpoints", 2, warned.append).newest() == 1
            assert not warned
        with opened() as workdir:
            assert directory(workdir).steps() == [1]
        assert steps_in(storage) == [1], "what was left of it is deleted"


def test_a_damaged_step_is_never_loaded(storage):
    with opened() as workdir:
        save(workdir, 1, 2)
    whole = dict(storage.objects)
    generator = np.random.default_rng(0)
    for name in [name for name in whole if "/checkpoints/2/" in name]:
        flipped = bytearray(whole[name])
        if flipped:
            flipped[generator.integers(len(flipped))] ^= 1 << generator.integers(8)
        for content in (bytes(flipped), whole[name][:-1], None):
            if content == whole[name]:
                continue
            storage.objects = {**whole, name: content}
            if content is None:
                del storage.objects[name]
            with fetched(URL, states=True) as copy:
                assert CheckpointDirectory(copy / "checkpoints", 2, [].append).newest() == 1, name


def test_a_killed_replacement_leaves_the_step_before(storage):
    """A step is replaced after the run went back behind it: the former one is no step any more."""
    with opened() as workdir:
        save(workdir, 1, 2)
        before = dict(storage.objects)
    storage.written.clear()
    with opened() as workdir:
        save(workdir, 2)
    changes = [(m, name) for m, name in storage.written if "/checkpoints/2/" in name]
    assert changes[0] == ("DELETE", f"{RUN}/checkpoints/2/{MANIFEST}")
    assert before.keys() != storage.objects.keys()
    assert changes[-1] == ("POST", f"{RUN}/checkpoints/2/{MANIFEST}")


def test_a_lasting_fault_ends_a_save_in_one_line(storage):
    with opened() as workdir:
        save(workdir, 1)
        storage.read_only = True
        with pytest.raises(UserError, match=f"^{URL}/.* cannot be written: PERMISSION_DENIED") as caught:
            save(workdir, 2)
        one_line(caught)
        storage.read_only = False
    assert steps_in(storage) == [1]


def test_logs_are_uploaded_while_the_run_goes_on(storage, monkeypatch):
    monkeypatch.setattr("milora_jax.storage.mirror.SYNC_SECONDS", 0.05)
    with opened() as workdir:
        path = workdir.path / "metrics.jsonl"
        for i in range(3):
            with path.open("a") as file:
                file.write(f"{i}\n")
            deadline = time.monotonic() + 10
            while storage.objects.get(f"{RUN}/metrics.jsonl") != path.read_bytes():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        (workdir.path / ".hidden").write_text("x")
        (workdir.path / "summary.tmp").write_text("x")
        (workdir.path / "plot.png").write_bytes(b"png")
    names = {name for name in storage.objects if name.startswith(RUN)}
    assert names == {f"{RUN}/metrics.jsonl", f"{RUN}/plot.png"}


def test_a_file_that_another_program_changed_is_not_overwritten(storage):
    def run():
        with opened() as workdir:
            (workdir.path / "summary.json").write_text("1")
            workdir.mirror.sync()
            storage.objects[f"{RUN}/summary.json"] = b"theirs"
            storage.generations[f"{RUN}/summary.json"] = 3
            (workdir.path / "summary.json").write_text("12")

    with pytest.raises(UserError, match=r"/summary.json was changed by another program"):
        run()
    assert storage.objects[f"{RUN}/summary.json"] == b"theirs"
    assert f"{RUN}/.lock" not in storage.objects


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//b", "a/\0b", "a/."])
def test_a_name_that_leads_outside_is_refused(storage, name):
    storage.objects[f"{RUN}/{name}"] = b"evil"
    with pytest.raises(UserError, match="which no file can have") as caught, fetched(URL):
        pass
    one_line(caught)


def test_objects_that_no_disk_can_hold_are_one_line(storage):
    storage.objects[f"{RUN}/a"] = storage.objects[f"{RUN}/a/b"] = b"x"
    with pytest.raises(UserError, match=f"cannot copy {URL}/a/b to ") as caught, fetched(URL):
        pass
    one_line(caught)


def test_a_reader_begins_again_when_a_step_goes_while_it_reads(storage):
    with opened() as workdir:
        save(workdir, 1, 2)
    answer, gone = storage.answer, []

    def deleting(target, asked):
        if "checkpoints%2F1%2F" in target and not gone:
            gone.append(True)
            for name in [name for name in storage.objects if "/checkpoints/1/" in name]:
                del storage.objects[name]
        return answer(target, asked)

    storage.answer = deleting
    with fetched(URL, states=True) as copy:
        assert CheckpointDirectory(copy / "checkpoints", 2, pytest.fail).steps() == [2]


def test_a_reader_of_results_copies_them_back(storage):
    storage.objects[f"{RUN}/old.jsonl"] = b"old"
    storage.objects[f"{RUN}/checkpoints/1/{MANIFEST}"] = b"{}"
    storage.objects[f"{RUN}/tensorboard/events"] = b"x"
    path = local_copy(URL)
    assert sorted(each.name for each in path.iterdir()) == ["old.jsonl"]
    with synced(path):
        (path / "new.jsonl").write_bytes(b"new")
    assert storage.objects[f"{RUN}/new.jsonl"] == b"new"
    assert [name for _, name in storage.written] == [f"{RUN}/new.jsonl"]
    assert as_given(path / "new.jsonl") == f"{URL}/new.jsonl"


def test_a_base_that_is_named_by_mistake_is_not_downloaded(storage):
    storage.objects[f"{RUN}/config.json"] = b"{}"
    storage.objects[f"{RUN}/model.safetensors"] = b"large"
    with fetched(URL) as copy:
        assert [each.name for each in copy.iterdir()] == ["config.json"]


def test_folders_of_killed_processes_are_removed(storage, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "milora_jax-dead.milora-partial").mkdir()
    with opened() as workdir:
        (there,) = tmp_path.iterdir()
        assert workdir.path.is_relative_to(there)
        with opened_workdir(f"{URL}-2", print):
            assert workdir.path.is_dir(), "another's is left"
    assert not list(tmp_path.iterdir())


def test_what_only_works_on_a_disk_refuses_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a directory, only"):
        WorkdirLock(Path(URL)).__enter__()
    with pytest.raises(UserError, match="expected a local directory"):
        require_new(Path(URL))
    assert in_bucket(str(tmp_path)) is in_bucket(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["s3://bucket/run", "gcs://bucket/run", "file:///run", "hf://owner/run"])
def test_an_address_of_another_scheme_is_no_directory(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (address, Path(address)):
        with pytest.raises(UserError, match=r"expected a directory or gs://BUCKET/PATH"):
            opened_workdir(given, print).__enter__()
        if not address.startswith("hf:"):  # an adapter may lie there
            with pytest.raises(UserError, match=r"expected a directory or gs://BUCKET/PATH"):
                fetched(given).__enter__()
        with pytest.raises(UserError, match="expected a directory, only"):
            WorkdirLock(Path(given)).__enter__()
    assert not list(tmp_path.iterdir())
