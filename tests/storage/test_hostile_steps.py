"""A step of checkpoints whose seal is good and whose content is not: one line, from every reader."""

import json
import shutil

import jax
import numpy as np
import pytest

from milora_jax.errors import UserError
from milora_jax.storage.adapters import best_metadata, load_adapter, require_its_base
from milora_jax.storage.checkpoint import METADATA, TREE
from milora_jax.storage.export import export_orbax, export_peft
from milora_jax.storage.files import json_bytes
from milora_jax.storage.manifest import MANIFEST, write_manifest
from milora_jax.storage.verify import findings
from tests.storage.adapters import STEP, run_of, write_run


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_of(folder / "run", model, "lora")
    export_orbax(folder / "run", folder / "out")
    return folder / "out"


def changed(step, change):
    values = json.loads((step / METADATA).read_text())
    change(values)
    (step / METADATA).write_bytes(json_bytes(values))


def without(values, name):
    del values[name]


CONTENT = {
    "no step": (lambda v: without(v, "step"), "holds step None, not 7"),
    "no metadata": (lambda v: without(v, "metadata"), "metadata is no object"),
    "metadata is a list": (lambda v: v.update(metadata=[]), "metadata is no object"),
    "no leaves": (lambda v: without(v, "leaves"), "leaves is no object with shape, dtype and impl"),
    "a leaf without dtype": (
        lambda v: without(next(iter(v["leaves"].values())), "dtype"),
        "leaves is no object with shape, dtype and impl",
    ),
    "no shape": (lambda v: without(v["metadata"], "shape"), "shape is no object with"),
    "no adapter": (lambda v: without(v["metadata"], "adapter"), "metadata has no adapter"),
    "no fingerprint": (lambda v: without(v["metadata"], "base_fingerprint"), "has no base_fingerprint"),
    "unknown quantisation": (lambda v: v["metadata"].update(quantize="int3"), "quantize is 'int3'"),
    "ill-typed quantisation": (lambda v: v["metadata"].update(quantize=3), "has no quantize"),
}


def resealed(exported, tmp_path, change):
    folder = tmp_path / "hostile"
    shutil.copytree(exported, folder)
    change(folder / str(STEP))
    (folder / str(STEP) / MANIFEST).unlink()
    write_manifest(folder / str(STEP))
    return folder


@pytest.mark.parametrize("name", CONTENT)
def test_metadata_that_are_none_are_refused_by_name(exported, tmp_path, name):
    change, message = CONTENT[name]
    folder = resealed(exported, tmp_path, lambda step: changed(step, change))
    with pytest.raises(UserError) as caught:
        load_adapter(folder)
    (found,) = findings(folder, None).values()
    assert message in str(caught.value)
    assert any(message in line for line in found)


def test_names_that_occur_twice_are_refused(exported, tmp_path):
    def doubled(step):
        text = (step / METADATA).read_text().rstrip()
        (step / METADATA).write_text(text[:-1] + ', "step": 7}\n')

    folder = resealed(exported, tmp_path, doubled)
    (found,) = findings(folder, None).values()
    assert "'step'" in found[0]


def test_a_tree_that_orbax_cannot_read_is_one_line(exported, tmp_path):
    def torn(step):
        for path in (step / TREE).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    folder = resealed(exported, tmp_path, torn)
    with pytest.raises(UserError, match="is damaged: tree: cannot be read") as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_claims_another_shape_fits_no_base(exported, model, tmp_path):
    """Its fingerprint may be copied from anywhere: what it says of the base must be true."""

    def deeper(values):
        values["metadata"]["shape"]["num_layers"] += 1

    folder = resealed(exported, tmp_path, lambda step: changed(step, deeper))
    with pytest.raises(UserError, match="made for a base of another shape"):
        require_its_base(best_metadata(folder), folder, model)
    (found,) = findings(folder, model).values()
    assert "made for a base of another shape" in found[0]


def test_an_adapter_that_changes_nothing_is_not_exported(model, tmp_path):
    adapter = run_of(tmp_path / "run", model, "lora")
    nothing = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-1].name == "b" else leaf, adapter.params
    )
    write_run(tmp_path / "zero", model, adapter.replace(params=nothing))
    with pytest.raises(UserError, match="the adapter changes nothing"):
        export_peft(tmp_path / "zero", tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()
