"""A directory that is not what an export writes is refused by name, whatever its seal says."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from milora_jax.errors import UserError
from milora_jax.storage.adapter_tensors import read_tensors, write_tensors
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.exported import CONFIG_FILE, EXPERTS_FILE, ROUTER_FILE
from milora_jax.storage.files import json_bytes
from milora_jax.storage.manifest import MANIFEST, write_manifest
from milora_jax.storage.verify import findings
from milora_jax.types import EXPERTS
from tests.storage.adapters import flip


def change_config(folder, **fields):
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_bytes(json_bytes(values | fields))


def change_shape(folder, **fields):
    change_config(folder, shape=json.loads((folder / CONFIG_FILE).read_text())["shape"] | fields)


def change_method(folder, **fields):
    change_config(folder, adapter=json.loads((folder / CONFIG_FILE).read_text())["adapter"] | fields)


def change_tensors(folder, file, change):
    tensors = dict(read_tensors(folder / file))
    change(tensors)
    write_tensors(folder / file, tensors)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WEIGHT = "layers.0.router.weight"
HOSTILE = {
    "no config field": (
        lambda f: (f / CONFIG_FILE).write_text("{}"),
        "format is None, this version reads 1 or 2 or 3 or 4",
    ),
    "another format": (
        lambda f: change_config(f, format=5),
        "format is 5, this version reads 1 or 2 or 3 or 4",
    ),
    "unknown field": (lambda f: change_config(f, extra=1), "'extra' is unknown"),
    "other epsilon": (
        lambda f: change_config(f, normalize_eps=1e-5),
        "normalize_eps is 1e-05, expected 1e-06",
    ),
    "ill-typed fingerprint": (lambda f: change_config(f, base_fingerprint=3), "base_fingerprint or quantize"),
    "unknown quantisation": (lambda f: change_config(f, quantize="int3"), "base_fingerprint or quantize"),
    "unknown method": (lambda f: change_method(f, method="evil"), "adapter.method is 'evil'"),
    "method of another form": (
        lambda f: change_config(f, adapter={"method": "ia3", "width": 3}),
        "method is 'ia3', expected one of milora",
    ),
    "settings left out": (
        lambda f: change_config(f, adapter={"method": "milora"}),
        "are not those of format 4",
    ),
    "settings are no object": (lambda f: change_config(f, adapter=[1]), "adapter is [1], expected an object"),
    "alpha is all but nothing": (
        lambda f: change_method(f, alpha=1e-320),
        "adapter.alpha is 1e-320: expected 0 (alpha = rank), or from 1e-06 to 1e+09",
    ),
    "alpha of 401 digits": (lambda f: change_method(f, alpha=10**400), "adapter.alpha has 401 digits"),
    "a silent no-op": (
        lambda f: change_tensors(
            f, EXPERTS_FILE, lambda t: t.update({n: v * 0 for n, v in t.items() if "lora_B" in n})
        ),
        "every product of lora_A and lora_B is zero: the adapter changes nothing",
    ),
    "setting out of range": (lambda f: change_method(f, top_k=8), "adapter.top_k is 8"),
    "rank mismatch": (lambda f: change_method(f, rank=5), "has shape [4, 48], expected [5, 48]"),
    "giant rank": (lambda f: change_method(f, rank=10**12), "expected [1000000000000, 48]"),
    "other pooler": (lambda f: change_method(f, pooler="mean"), "unexpected tensor 'layers.0.router.pool'"),
    "too many layers": (
        lambda f: change_shape(f, num_layers=3),
        "layers.2.mlp.down_proj.lora_A.weight' is missing",
    ),
    "endless layers": (lambda f: change_shape(f, num_layers=10**9), "shape.num_layers is 1000000000"),
    "no layers": (lambda f: change_shape(f, num_layers=True), "shape.num_layers is True"),
    "other width": (lambda f: change_shape(f, hidden_size=31), "has shape [32], expected [31]"),
    "modules left out": (
        lambda f: change_shape(f, modules={"q": [32, 32]}),
        "shape.modules is no object with",
    ),
    "ill-typed widths": (
        lambda f: change_shape(f, modules={name: [32] for name in EXPERTS}),
        "shape.modules.down is not two widths",
    ),
    "shape is no object": (lambda f: change_config(f, shape=7), "shape is no object"),
    "tensor missing": (
        lambda f: change_tensors(f, EXPERTS_FILE, lambda t: t.pop(A)),
        f"{EXPERTS_FILE}: tensor {A!r} is missing",
    ),
    "tensor too many": (
        lambda f: change_tensors(f, EXPERTS_FILE, lambda t: t.update(x=t[A])),
        f"{EXPERTS_FILE}: unexpected tensor 'x'",
    ),
    "no name matches": (
        lambda f: change_tensors(f, EXPERTS_FILE, lambda t: [t.update({"x" + n: t.pop(n)}) for n in list(t)]),
        "no tensor has an expected name: found 'xbase_model",
    ),
    "no tensors": (
        lambda f: change_tensors(f, ROUTER_FILE, dict.clear),
        "no tensor has an expected name: found none",
    ),
    "tensor of another dtype": (
        lambda f: change_tensors(f, ROUTER_FILE, lambda t: t.update({WEIGHT: t[WEIGHT].astype(np.float16)})),
        f"{ROUTER_FILE}: tensor {WEIGHT!r} has dtype float16, expected float32",
    ),
    "tensor that is not finite": (
        lambda f: change_tensors(f, ROUTER_FILE, lambda t: t.update({WEIGHT: t[WEIGHT] / np.float32(0)})),
        f"{ROUTER_FILE}: tensor {WEIGHT!r} holds values that are not finite",
    ),
    "pickle": (
        lambda f: (f / EXPERTS_FILE).write_bytes(b"\x80\x04\x95" + b"x" * 99),
        "not a whole safetensors",
    ),
    "file missing": (lambda f: (f / ROUTER_FILE).unlink(), f"{ROUTER_FILE}: missing"),
    "file too many": (
        lambda f: (f / "adapter_model.bin").write_text("x"),
        "adapter_model.bin: not expected here",
    ),
    "a folder in it": (
        lambda f: ((f / "deep").mkdir(), (f / "deep" / "x").write_text("x")),
        "deep/x: not expected here",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_directory_with_a_good_seal_is_refused_by_name(name, exported, tmp_path):
    change, message = HOSTILE[name]
    folder = tmp_path / "hostile"
    shutil.copytree(exported, folder)
    with np.errstate(all="ignore"):
        change(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    with pytest.raises(UserError) as caught:
        load_adapter(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert any(message in line for line in findings(folder, None)[folder])


DAMAGED = {
    "bit": (lambda f: flip(f / EXPERTS_FILE), "content differs from its SHA-256"),
    "trailing": (
        lambda f: (f / ROUTER_FILE).write_bytes((f / ROUTER_FILE).read_bytes() + b"\0"),
        "bytes, expected",
    ),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json: missing"),
    "link": (
        lambda f: ((f / ROUTER_FILE).unlink(), (f / ROUTER_FILE).symlink_to("/etc/passwd")),
        "symbolic link",
    ),
    "path outside": (
        lambda f: (f / MANIFEST).write_bytes(
            json_bytes({"format": 1, "files": {"../outside": {"sha256": "0" * 64, "size": 1}}})
        ),
        "listed under a path outside the directory",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_broken_seal_is_refused_and_nothing_outside_is_opened(name, exported, tmp_path):
    change, message = DAMAGED[name]
    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    change(folder)
    opened = []
    watching = True

    def watch(event, arguments):
        if watching and event == "open" and isinstance(arguments[0], str | Path):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    with pytest.raises(UserError, match=message):
        load_adapter(folder)
    watching = False
    assert opened or name == "no manifest", "the hook saw nothing"
    assert all(Path(path).parent == folder for path in opened), opened
    assert any(message in line for line in findings(folder, None)[folder])


def test_every_finding_has_its_line(exported, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(exported, folder)
    change_tensors(folder, EXPERTS_FILE, lambda t: (t.pop(A), t.update(x=np.ones(1, np.float32))))
    change_tensors(folder, ROUTER_FILE, lambda t: t.update({WEIGHT: t[WEIGHT].T}))
    assert [line.partition(":")[0] for line in findings(folder, None)[folder]] == [EXPERTS_FILE, ROUTER_FILE]
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    assert findings(folder, None)[folder] == [
        f"{EXPERTS_FILE}: tensor {A!r} is missing",
        f"{EXPERTS_FILE}: unexpected tensor 'x'",
        f"{ROUTER_FILE}: tensor {WEIGHT!r} has shape [32, 7], expected [7, 32]",
    ]
