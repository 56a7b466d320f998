"""Training may start from an adapter that there is already, if it is of the same kind and base."""

import subprocess

import jax
import numpy as np
import pytest

from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.load import load_base
from milora_jax.config import AdapterSection, Config
from milora_jax.errors import UserError
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.export import export_milora, export_peft
from milora_jax.storage.imported import import_peft
from milora_jax.training import prepare
from milora_jax.training.start import starting_params
from tests.models import TINY, write_hf_directory
from tests.paths import ROOT, environment
from tests.storage.adapters import run_of
from tests.training.runs import command


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A base, an adapter on it in a workdir and as an export, and the adapter."""
    folder = tmp_path_factory.mktemp("stored")
    write_hf_directory(folder / "model", TINY, tokenizer=False)
    adapter = run_of(folder / "run", folder / "model", "milora", alpha=8.0)
    export_milora(folder / "run", folder / "export")
    return folder, adapter


def settings(**changes):
    return build_method(AdapterSection(**{"method": "milora", "rank": 4, "alpha": 8.0, **changes}))


@pytest.mark.parametrize("form", ["run", "export"])
def test_a_stored_adapter_is_the_start(form, stored):
    folder, adapter = stored
    method = settings(dropout=0.3, load_balance=0.5)
    found = starting_params(str(folder / form), method, adapter.shape, folder / "model")
    jax.tree.map(np.testing.assert_array_equal, found, adapter.params)


def test_the_same_scale_said_otherwise_is_no_other_function(stored):
    folder, adapter = stored
    same = settings(alpha=4.0, use_rslora=True)
    assert same.scale == adapter.method.scale == 2.0
    starting_params(str(folder / "run"), same, adapter.shape, folder / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "midora"}, "adapter.method is 'midora': expected 'milora', of the adapter in"),
        ({"rank": 8}, "adapter.rank is 8: expected 4, of the adapter in train.init_from"),
        ({"alpha": None}, "adapter.alpha is 0.0: expected 8.0"),
        ({"use_rslora": True}, "adapter.use_rslora is True: expected False"),
        ({"top_k": 2}, "adapter.top_k is 2: expected 3"),
    ],
)
def test_an_adapter_that_computes_another_function_is_refused(changes, message, stored):
    folder, adapter = stored
    with pytest.raises(UserError, match=message):
        starting_params(str(folder / "run"), settings(**changes), adapter.shape, folder / "model")


def test_an_adapter_of_another_base_is_refused(stored, tmp_path):
    folder, adapter = stored
    write_hf_directory(tmp_path, TINY, seed=1, tokenizer=False)
    with pytest.raises(UserError, match="are not those that the adapter"):
        starting_params(str(folder / "run"), settings(), adapter.shape, tmp_path)


def train(inputs, workdir, **more):
    done = subprocess.run(
        command(inputs, workdir, **{"train.max_steps": 2, "train.eval_every": 2, **more}),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_adapter(workdir)


@pytest.mark.slow
def test_a_run_goes_on_from_the_experts_of_another_program(inputs, tmp_path):
    """PEFT's LoRA becomes the experts of a MiLoRA; at a learning rate of 0 they are what comes out."""
    base, config = load_base(inputs / "model")
    lora = run_of(tmp_path / "theirs", inputs / "model", "lora", alpha=8.0)
    assert lora.shape == adapter_shape(config)
    del base
    export_peft(tmp_path / "theirs", tmp_path / "peft", "base")
    import_peft(tmp_path / "peft", inputs / "model", tmp_path / "start", "milora")
    same = {"adapter.rank": 4, "adapter.alpha": 8.0, "train.init_from": tmp_path / "start"}
    still = {"train.learning_rate": 0.0, "train.coefficient_learning_rate": 0.0}
    found = train(inputs, tmp_path / "still", **same, **still)
    jax.tree.map(np.testing.assert_array_equal, found.params, load_adapter(tmp_path / "start").params)
    moved = train(inputs, tmp_path / "moved", **same)
    assert float(np.abs(moved.params.experts["q"].b - lora.params["q"].b).max()) > 1e-4


def test_a_start_that_is_not_there_is_told_before_anything_is_loaded(stored, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "x", "output": "y"}\n' * 8)
    values = {
        "model": {"path": str(stored[0] / "model")},
        "data": {"train": str(rows), "max_length": 64},
        "train": {"init_from": str(tmp_path / "none")},
    }
    monkeypatch.setattr(prepare, "load_leaves", None)
    with pytest.raises(UserError, match="no such directory, expected a workdir or an exported adapter"):
        prepare.prepare_run(Config.from_dict(values), tmp_path / "w", print)
    assert not (tmp_path / "w").exists()
