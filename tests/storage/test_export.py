"""An exported adapter is the adapter, every byte of it checked, and anything else is refused by name."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from milora_jax.adapters.registry import METHODS
from milora_jax.commands.storage import FORMATS, main
from milora_jax.errors import UserError
from milora_jax.storage.adapter_tensors import write_tensors
from milora_jax.storage.adapters import best_metadata, load_adapter, require_its_base
from milora_jax.storage.export import ORIGIN_FILE, export_milora, export_orbax, export_peft, formats_of
from milora_jax.storage.exported import CONFIG_FILE, EXPERTS_FILE, ROUTER_FILE, write_exported
from milora_jax.storage.files import UNFINISHED, new_directory
from milora_jax.storage.manifest import MANIFEST, write_manifest
from milora_jax.storage.peft import PEFT_CONFIG, PEFT_TENSORS
from milora_jax.storage.verify import findings
from tests.models import TINY
from tests.storage.adapters import STEP, assert_equal, flip, run_of

ROOT = Path(__file__).resolve().parents[2]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

SETTINGS = [
    ("milora", {}),
    ("milora", {"pooler": "mean", "activation": "relu-gelu", "gate": "softmax"}),
    ("midora", {"alpha": 3.0}),
    ("lora", {"alpha": 8.0, "dropout": 0.1}),
    ("dora", {}),
]


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_the_portable_form_is_the_adapter_bit_for_bit(method, settings, model, other, tmp_path):
    adapter = run_of(tmp_path / "run", model, method, **settings)
    export_milora(tmp_path / "run", tmp_path / "out")
    assert_equal(load_adapter(tmp_path / "out"), adapter)
    assert require_its_base(best_metadata(tmp_path / "out"), tmp_path / "out", model) == "none"
    with pytest.raises(UserError, match="are not those that the adapter of"):
        require_its_base(best_metadata(tmp_path / "out"), tmp_path / "out", other)
    assert findings(tmp_path / "out", model) == {tmp_path / "out": []}
    assert "made on another base" in findings(tmp_path / "out", other)[tmp_path / "out"][0]
    export_milora(tmp_path / "out", tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_the_files_have_the_documented_names_and_layout(run, exported):
    adapter = load_adapter(run)
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        [CONFIG_FILE, EXPERTS_FILE, ROUTER_FILE, MANIFEST]
    )
    experts, router = load_file(exported / EXPERTS_FILE), load_file(exported / ROUTER_FILE)
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(experts[f"{prefix}.lora_A.weight"], adapter.params.experts["down"].a[1].T)
    np.testing.assert_array_equal(experts[f"{prefix}.lora_B.weight"], adapter.params.experts["down"].b[1].T)
    assert len(experts) == TINY.num_layers * 7 * 2
    np.testing.assert_array_equal(router["layers.1.router.weight"], adapter.params.router.weight[1].T)
    np.testing.assert_array_equal(router["layers.1.router.pool"], adapter.params.router.pool[1])
    for name in ("numerator", "denominator", "mean", "deviation"):
        np.testing.assert_array_equal(
            router[f"layers.1.router.{name}"], getattr(adapter.params.router, name)[1]
        )
    assert len(router) == TINY.num_layers * 6


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["milora", "ssp", "iapt"])
def test_orbax_takes_any_method(method, model, tmp_path):
    adapter = run_of(tmp_path / "run", model, method)
    export_orbax(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [str(STEP)]
    assert_equal(load_adapter(tmp_path / "out"), adapter)
    assert best_metadata(tmp_path / "out") == best_metadata(tmp_path / "run")
    assert findings(tmp_path / "out", model) == {tmp_path / "out" / str(STEP): []}


def test_the_portable_form_becomes_a_checkpoint(exported, run, tmp_path):
    export_orbax(exported, tmp_path / "out")
    assert_equal(load_adapter(tmp_path / "out"), load_adapter(run))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "export", "message"),
    [
        (
            "ia3",
            export_milora,
            "method 'ia3' has no portable form: expected one of milora, midora, lora, dora",
        ),
        ("milora", lambda run, out: export_peft(run, out, "x"), "method 'milora' has no PEFT form"),
        ("moelora", lambda run, out: export_peft(run, out, "x"), "method 'moelora' has no PEFT form"),
    ],
)
def test_a_method_without_the_form_is_refused_and_nothing_is_left(method, export, message, model, tmp_path):
    run_of(tmp_path / "run", model, method)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_formats_that_the_command_writes(method, model, tmp_path, monkeypatch):
    adapter = run_of(tmp_path / "run", model, method)
    found = set()
    for name in set(FORMATS) - {"static"}:  # which takes rows
        arguments = ["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["storage", *arguments, "--format", name])
        try:
            main()
            found.add(name)
        except UserError:
            assert not (tmp_path / name).exists()
    assert found == set(formats_of(adapter.method, fused=False))
    assert found - {"peft"} == set(formats_of(adapter.method, fused=True))


def test_nothing_is_written_over_and_a_failed_export_leaves_nothing(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("full")
    for name, reason in {
        "full": "is not empty",
        "file": "is no directory",
        "link": "is no directory",
    }.items():
        with pytest.raises(UserError, match=f"exists and {reason}"):
            export_milora(run, tmp_path / name)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="disk full"):
        halfway(tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty").chmod(0o700)
    stale, mine = tmp_path / f".empty.abc{UNFINISHED}", tmp_path / ".empty.tmp"
    (stale / "of a killed run").mkdir(parents=True)
    mine.mkdir()
    export_milora(run, tmp_path / "empty")
    assert findings(tmp_path / "empty", None) == {tmp_path / "empty": []}
    assert not stale.exists()
    assert mine.exists(), "whatever is somebody else's stays"
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700
    with pytest.raises(UserError, match="disk full"):
        halfway(tmp_path / "one" / "two" / "three")
    assert not (tmp_path / "one").exists()


def test_of_two_who_write_to_one_place_the_first_to_finish_gets_it(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        both(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["of the second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def both(out):
    with new_directory(out) as first:
        (first / "of the first").write_text("x")
        with new_directory(out) as second:
            (second / "of the second").write_text("y")


@pytest.mark.thorough
def test_an_export_that_is_ended_leaves_nothing(run, model, tmp_path):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        code = f"""
import os, signal, sys
from milora_jax.commands.command_line import run_command
from milora_jax.commands.storage import main
from milora_jax.storage import export
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts a job in the background ignores it
write = export.write_exported
def slow(*given):
    write(*given)
    os.kill(os.getpid(), {int(number)})
export.write_exported = slow
sys.argv = ["x", "export", "--format", "milora"]
sys.argv += ["--workdir", {str(run)!r}, "--out", {str(tmp_path / "out")!r}]
run_command(main)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stderr, done.stdout) == (130, "error: interrupted\n", "")
        assert list(tmp_path.iterdir()) == []


def halfway(out):
    with new_directory(out) as partial:
        (partial / "half").write_text("x")
        raise OSError(28, "disk full")


def test_the_command_exports_and_verifies(run, model, other, tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["storage", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    out = tmp_path / "out"
    command("export", "--workdir", run, "--out", out, "--format", "milora", "--base", model)
    assert_equal(load_adapter(out), load_adapter(run))
    assert command("verify", out, "--base", model) == f"{out}  ok\n"
    with pytest.raises(UserError, match="the files of "):
        command("export", "--workdir", run, "--out", tmp_path / "no", "--format", "orbax", "--base", other)
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="is no workdir that names its base: give --base"):
        command("export", "--workdir", out, "--out", tmp_path / "no", "--format", "peft")
    flip(out / EXPERTS_FILE)
    arguments = [sys.executable, "-m", "milora_jax.storage", "verify", out]
    bad = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert bad.returncode == 2
    assert bad.stdout == f"{out}  {EXPERTS_FILE}: content differs from its SHA-256\n"
    assert bad.stderr == f"error: 1 of 1 adapters of {str(out)!r} are damaged or do not fit\n"


def test_a_peft_export_says_which_base_it_is_for(model, other, tmp_path):
    run_of(tmp_path / "run", model, "lora", alpha=2.5)
    out = tmp_path / "out"
    export_peft(tmp_path / "run", out, "some/base")
    settings = json.loads((out / PEFT_CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (
        4,
        2.5,
        "some/base",
    )
    assert list(settings) == sorted(settings)
    assert findings(out, model) == {out: []}
    assert "made on another base" in findings(out, other)[out][0]
    flip(out / PEFT_TENSORS)
    assert findings(out, None)[out][0] == f"{PEFT_TENSORS}: content differs from its SHA-256"
    (out / MANIFEST).unlink()
    (out / ORIGIN_FILE).unlink()
    assert findings(out, None) == {out: []}, "a stranger's directory has no seal"
    with pytest.raises(UserError, match="is a PEFT adapter, which names no base"):
        load_adapter(out)


def test_vectors_are_exported_and_verified_as_well(model, tmp_path):
    adapter = run_of(tmp_path / "run", model, "ia3")
    out = tmp_path / "out"
    export_peft(tmp_path / "run", out, "base")
    assert findings(out, model) == {out: []}
    tensors = load_file(out / PEFT_TENSORS)
    name = "base_model.model.model.layers.1.mlp.up_proj.ia3_l"
    vector = jax.tree.map(lambda leaf: leaf[1], adapter.params["up"]).product()
    np.testing.assert_allclose(tensors[name][:, 0], 1 + np.asarray(vector), rtol=1e-6)
    del tensors[name]
    write_tensors(out / PEFT_TENSORS, tensors)
    write_manifest(out)
    assert findings(out, None) == {out: [f"{PEFT_TENSORS}: tensor {name!r} is missing"]}


@pytest.mark.thorough
def test_pruned_and_gated_pairs_are_written_as_lora(model, tmp_path):
    for method, settings in {"adalora": {"alpha": 6.0}, "ssp": {}}.items():
        adapter = run_of(tmp_path / method, model, method, **settings)
        export_peft(tmp_path / method, tmp_path / f"{method}-out", "x")
        assert findings(tmp_path / f"{method}-out", model) == {tmp_path / f"{method}-out": []}
        tensors = load_file(tmp_path / f"{method}-out" / PEFT_TENSORS)
        values = json.loads((tmp_path / f"{method}-out" / PEFT_CONFIG).read_text())
        found = values["lora_alpha"] / values["r"] * (tensors[A.replace("_A", "_B")] @ tensors[A])
        settled = jax.tree.map(lambda leaf: leaf[0], adapter.method.settle(adapter.params))
        pair = adapter.method.folded(settled)["q"]
        expected = adapter.method.scale * np.asarray(pair.a @ pair.b).T
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_older_runs_did_not_say_is_filled_in(run, tmp_path):
    adapter, metadata = load_adapter(run), best_metadata(run)
    del metadata["quantize"]
    with new_directory(tmp_path / "out") as partial:
        write_exported(partial, adapter, metadata)
    assert best_metadata(tmp_path / "out")["quantize"] == "none"
    changed = dataclasses.replace(adapter, params=jax.tree.map(lambda leaf: leaf * 2, adapter.params))
    with pytest.raises(AssertionError):
        assert_equal(load_adapter(tmp_path / "out"), changed)
