"""A model in Google Cloud Storage: the same leaves and the same fingerprint as from a disk, or one line."""

import socket

import jax
import numpy as np
import pytest

from milora_jax import load_base
from milora_jax.base import gcs, source
from milora_jax.base.byte_files import read_span
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.base.source import model_directory, weight_files
from milora_jax.errors import UserError
from tests.base.pieces import PLAIN
from tests.base.shards import shard
from tests.fake_gcs import BUCKET, in_reach
from tests.models import WITH_TOKENIZER, random_base, write_hf_directory

pytest.importorskip("tensorstore")

URL = f"gs://{BUCKET}/models/plain"
WEIGHTS = "models/plain/model.safetensors"


@pytest.fixture
def storage(monkeypatch):
    source._mirrored.cache_clear()
    with in_reach(monkeypatch) as storage:
        yield storage


@pytest.fixture
def model(storage, tmp_path):
    """A small model on the disk, which the storage has too."""
    write_hf_directory(tmp_path, PLAIN, tokenizer=False)
    storage.upload(tmp_path, "models/plain")
    storage.objects["models/plain/sub/config.json"] = b"another"
    storage.objects["models/plain-two/config.json"] = b"another"
    storage.objects["models/plain/modeling.py"] = b"evil"
    return tmp_path


@pytest.mark.thorough
@pytest.mark.parametrize("block", [2**22, 256])
@pytest.mark.parametrize("url", [URL, f"{URL}/"])
def test_the_leaves_are_those_of_the_disk(storage, model, monkeypatch, url, block):
    monkeypatch.setattr(gcs.RemoteFile, "block", block)
    base, config = load_base(url)
    assert config == PLAIN
    jax.tree.map(np.testing.assert_array_equal, base, random_base(PLAIN))
    assert {name for name, asked in storage.asked if asked is None} == {"models/plain/config.json"}


def test_of_the_weights_every_byte_comes_once(storage, model):
    load_base(URL)
    spans = [asked.removeprefix("bytes=").split("-") for name, asked in storage.asked if name == WEIGHTS]
    read = sum(int(last) + 1 - int(first) for first, last in spans)
    size = len(storage.objects[WEIGHTS])
    header = int.from_bytes(storage.objects[WEIGHTS][:8], "little")
    assert size <= read <= size + 2 * header + 64, "the header comes twice"


def test_shards_and_a_tokenizer(storage, tmp_path):
    pytest.importorskip("transformers")
    write_hf_directory(tmp_path, WITH_TOKENIZER)
    expected, _ = load_base(tmp_path)
    shard(tmp_path)
    storage.upload(tmp_path, "models/plain")
    base, config = load_base(URL)
    assert config == WITH_TOKENIZER
    jax.tree.map(np.testing.assert_array_equal, base, expected)
    from milora_jax.data.tokens import load_tokenizer

    assert load_tokenizer(str(model_directory(URL))).bos_token_id == 1


@pytest.mark.parametrize("whole_below", [2**20, 1000])
def test_the_fingerprint_is_that_of_the_disk(storage, model, monkeypatch, whole_below):
    monkeypatch.setattr("milora_jax.base.fingerprint.WHOLE_BELOW", whole_below)
    monkeypatch.setattr("milora_jax.base.fingerprint.SAMPLE_BYTES", 64)
    assert base_fingerprint(model_directory(URL)) == base_fingerprint(model)
    source._mirrored.cache_clear()
    changed = bytearray(storage.objects[WEIGHTS])
    changed[-1] ^= 1
    storage.objects[WEIGHTS] = bytes(changed)
    assert base_fingerprint(model_directory(URL)) != base_fingerprint(model)


def test_a_process_asks_once(storage, model):
    assert model_directory(URL) == model_directory(URL)
    count = len(storage.asked)
    model_directory(URL)
    assert len(storage.asked) == count


def test_a_local_directory_sends_nobody_to_the_cloud(storage, model):
    (model / "gs:").mkdir()
    load_base(model)
    assert storage.asked == []


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_the_size_of_any_file_is_found(storage, size):
    storage.objects["a/x.safetensors"] = bytes(size)
    storage.objects["a/config.json"] = b"{}"
    file = weight_files(model_directory(f"gs://{BUCKET}/a"))["x.safetensors"]
    assert file.size() == size
    if size:
        assert read_span(file, size - 1, size) == b"\0"
    with pytest.raises(UserError, match=r"/a/x.safetensors: ends where there were more bytes"):
        read_span(file, max(0, size - 1), size + 1)


HOSTILE = {
    "truncated": (lambda whole: whole[:-4], "truncated: tensor '.*' ends at"),
    "trailing bytes": (lambda whole: whole + b"12", "2 trailing bytes after the last tensor"),
    "no header": (lambda whole: whole[:5], "not a whole safetensors file: its header has 5 bytes"),
    "huge header": (lambda whole: b"\xff" * 8 + whole[8:], "not a whole safetensors file: its header has"),
    "a pickle": (lambda whole: b"\x80\x04\x95" + bytes(40), "not a whole safetensors file"),
    "empty": (lambda whole: b"", "not a whole safetensors file: its header has 0 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_refused_by_name(storage, model, name):
    damage, message = HOSTILE[name]
    storage.objects[WEIGHTS] = damage(storage.objects[WEIGHTS])
    with pytest.raises(UserError, match=message) as caught:
        load_base(URL)
    assert str(caught.value).startswith(f"{URL}/model.safetensors: ")


def test_a_file_that_is_replaced_while_it_is_read_is_refused(storage, model):
    file = weight_files(model_directory(URL))["model.safetensors"]
    assert file.size() == len(storage.objects[WEIGHTS])
    assert len(read_span(file, 0, 8)) == 8
    storage.generations[WEIGHTS] = 2
    with pytest.raises(UserError, match="was replaced while it was read"):
        read_span(file, 8, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gs://", "bucket"),
        ("gs:/fake-bucket/x", "expected gs://BUCKET/PATH"),
        ("gs://Not a Bucket/x", "bucket"),
        (f"gs://{BUCKET}/none", "no such directory, or there are no files in it"),
        ("gs://other-bucket/none", "cannot be listed"),
    ],
)
def test_what_is_no_directory_is_one_line(storage, model, name, message):
    with pytest.raises(UserError, match=message) as caught:
        model_directory(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_storage_that_refuses_is_one_line(storage, model, status):
    storage.refuse = status
    with pytest.raises(UserError, match=f"^{URL}: cannot be listed") as caught:
        load_base(URL)
    assert "\n" not in str(caught.value)
    storage.refuse = 0
    directory = model_directory(URL)
    storage.refuse = status
    with pytest.raises(UserError, match=rf"^{URL}/model.safetensors: .*{status}"):
        base_fingerprint(directory)


def test_busy_answers_and_cut_bodies_are_retried(storage, model, monkeypatch):
    monkeypatch.setattr(gcs, "RETRIES", {"max_retries": 4, "initial_delay": "1ms", "max_delay": "1ms"})
    storage.failures = [503, 429, 500]
    directory = model_directory(URL)
    storage.failures = [429, 503]
    storage.cut = 1
    base, _ = load_base(URL)
    assert (storage.failures, storage.cut) == ([], 0)
    jax.tree.map(np.testing.assert_array_equal, base, random_base(PLAIN))
    storage.cut = 10**6
    with pytest.raises(UserError, match=rf"^{URL}/model.safetensors: .*missing") as caught:
        read_span(weight_files(directory)["model.safetensors"], 0, 1000)
    assert "\n" not in str(caught.value)


def test_a_storage_that_is_not_there_is_one_line(storage, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot be listed \(.*connect"):
            load_base(URL)


def test_the_directory_of_a_model_goes_with_its_process(storage, model, tmp_path):
    """What was fetched lies in a directory of its own, named in the end to be removed."""
    directory = model_directory(URL)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json"]
    assert directory != model_directory(f"gs://{BUCKET}/models/plain-two")
