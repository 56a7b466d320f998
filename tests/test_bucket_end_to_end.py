"""A whole run in a bucket, and every command that reads it there."""

import json
import sys

import numpy as np
import pytest

import milora_jax
from milora_jax.commands import doctor, evaluation, generation, storage
from milora_jax.errors import UserError, exit_report
from tests.fake_gcs import BUCKET, in_reach, serving
from tests.test_end_to_end import folder, run_training, train_in

pytest.importorskip("tensorstore")

pytestmark = pytest.mark.thorough

URL = f"gs://{BUCKET}/runs/math"

__all__ = ["folder"]


@pytest.fixture(scope="module")
def bucket(folder, tmp_path_factory):
    """The storage after a run, what the run said, and the same run on a disk."""
    workdir = tmp_path_factory.mktemp("disk") / "w"
    with pytest.MonkeyPatch.context() as monkeypatch, in_reach(monkeypatch) as storage:
        run_training(folder, workdir, monkeypatch)
        said = []
        monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        train_in(folder, URL, monkeypatch)
        monkeypatch.undo()
        monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
        yield storage, "\n".join(said), workdir


@pytest.fixture(autouse=True)
def address(bucket, monkeypatch):
    """The server of the module's storage, under a new address."""
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
    with serving(bucket[0]) as address:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        yield


def called(monkeypatch, command, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    command.main()


def test_a_run_writes_the_same_files(bucket):
    storage, said, workdir = bucket
    there = {path.relative_to(workdir).as_posix() for path in workdir.rglob("*") if path.is_file()}
    here = {name.removeprefix("runs/math/") for name in storage.objects}
    loose = {name for name in there if "/" not in name and name != ".lock"}
    assert {name for name in here if "/" not in name} == loose
    steps = {name.rpartition("/")[0] for name in there if name.endswith("/manifest.json")}
    assert {name.rpartition("/")[0] for name in here if name.endswith("/manifest.json")} == steps
    for name in ("predictions.jsonl", "base_scores.json"):
        if name in loose:
            assert storage.objects[f"runs/math/{name}"] == (workdir / name).read_bytes()
    summaries = [json.loads(storage.objects["runs/math/summary.json"])]
    summaries.append(json.loads((workdir / "summary.json").read_text()))
    for summary in summaries:
        del summary["wall_seconds"], summary["tokens_per_second"]
    assert summaries[0] == summaries[1]
    assert f"--workdir {URL} --prompt" in said
    assert f"written to {URL}: best/" in said
    assert "milora_jax-" not in said, "no temporary folder is named"


def test_the_adapter_is_that_of_the_disk(bucket):
    import jax

    found = [milora_jax.load_adapter(place).params for place in (URL, bucket[2])]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_scores_are_kept_beside_the_run(bucket, monkeypatch, capsys):
    storage, _, workdir = bucket
    called(monkeypatch, evaluation, "--workdir", URL, "--limit", 9)
    found = capsys.readouterr()
    assert json.loads(found.out)["rows"] == {"sums": 9, "gsm8k": 9}
    assert f"predictions: {URL}/evaluation.jsonl" in found.err
    assert storage.objects["runs/math/evaluation.jsonl"] == (workdir / "predictions.jsonl").read_bytes()
    asked = len(storage.written)
    called(monkeypatch, evaluation, "--workdir", URL, "--limit", 9)
    assert json.loads(capsys.readouterr().out)["rows"] == {"sums": 9, "gsm8k": 9}
    assert len(storage.written) <= asked + 2, "nothing is scored again"


def test_generation_takes_an_address(monkeypatch, capsys):
    called(monkeypatch, generation, "--workdir", URL, "--prompt", "1 + 1", "--max-new-tokens", 3, "--json")
    assert json.loads(capsys.readouterr().out)["samples"]


def test_verify_and_doctor_look_at_every_step(bucket, monkeypatch, capsys):
    called(monkeypatch, storage, "verify", URL)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"{URL}/checkpoints/6  ok")]
    assert [line for line in lines if line.startswith(f"{URL}/best/")]
    doctor.main(["--workdir", URL])
    found = capsys.readouterr().out
    assert "ok    workdir" in found
    assert "milora_jax-" not in found
    name = "runs/math/checkpoints/6/arrays.safetensors"
    whole = bucket[0].objects[name]
    bucket[0].objects[name] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(UserError) as caught:
        called(monkeypatch, storage, "verify", URL)
    bucket[0].objects[name] = whole
    assert "milora_jax-" not in exit_report(caught.value).line
    assert URL in exit_report(caught.value).line
    assert "damaged: arrays.safetensors" in capsys.readouterr().out


def test_an_export_goes_to_a_disk_and_may_be_copied_to_a_bucket(bucket, monkeypatch, tmp_path):
    out = tmp_path / "out"
    called(monkeypatch, storage, "export", "--workdir", URL, "--out", out, "--format", "milora")
    bucket[0].upload(out, "exports/math")
    called(monkeypatch, storage, "verify", f"gs://{BUCKET}/exports/math")
    with pytest.raises(UserError, match="expected a local directory"):
        called(monkeypatch, storage, "export", "--workdir", URL, "--out", URL, "--format", "milora")


def test_an_empty_place_is_new_to_the_doctor_and_no_workdir_to_others(monkeypatch, capsys):
    empty = f"gs://{BUCKET}/runs/none"
    with pytest.raises(UserError, match="is no workdir") as caught:
        called(monkeypatch, evaluation, "--workdir", empty)
    assert empty in exit_report(caught.value).line
