"""Every method: a few steps on the published model, written in every format it has, and read again.

What other programs read gives our logits there: PEFT, transformers, and the reader for torch.
"""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.registry import METHODS
from milora_jax.base.load import load_base
from milora_jax.commands import storage
from milora_jax.config import AdapterSection
from milora_jax.errors import UserError
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.export import export_merged, export_milora, export_orbax, export_peft, export_static
from milora_jax.storage.files import json_bytes
from milora_jax.storage.imported import BECOMES, import_peft
from milora_jax.storage.torch_reference import attach
from milora_jax.storage.verify import findings
from tests.models import SMALL
from tests.real.conftest import STEPS
from tests.real.reference import rms, their_loss
from tests.storage.adapters import assert_equal
from tests.storage.torch_logits import assert_near, logits_of, their_logits, torch_model
from tests.training.short_runs import fit

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

SHORT = ("milora", "lora")
"""The methods of the short part."""

PART = "methods"
IN_PEFT = ("lora", "dora", "adalora", "ssp", "ia3")
IN_TORCH = ("milora", "midora")
IN_ONE_MODEL = ("lora", "dora", "adalora", "ssp", *IN_TORCH)
RATES = {"adalora": 5e-2}
"""Learning rates where that of the other methods is too low: at 1e-2 three steps of AdaLoRA move the logits
by 0.032, root mean square, and rounding a merged model to bfloat16 alone moves them by 0.013."""

ROWS, LENGTH = 2, 96
NEAR = 2e-5
"""Of the largest logit; their logits without an adapter are as near to ours."""


@pytest.fixture(scope="module")
def perplexity(run, theirs):
    """Of the dev rows without an adapter, by transformers."""
    return float(np.exp(their_loss(theirs, run.dev)))


@pytest.fixture(
    scope="module",
    params=[*SHORT, *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in SHORT)],
)
def case(request, run, steps, theirs, text, tmp_path_factory):
    """A method after a few steps: its workdir, its adapter, tokens and what it makes of them."""
    method, workdir = request.param, tmp_path_factory.mktemp("run")
    settings = AdapterSection(method=method, **SMALL[method])
    rate = RATES.get(method, run.config.train.learning_rate)
    train = dataclasses.replace(run.config.train, learning_rate=rate)
    mine = dataclasses.replace(run, config=dataclasses.replace(run.config, adapter=settings, train=train))
    ended = fit(mine, steps, workdir)
    assert ended.steps == STEPS
    (workdir / "config.json").write_bytes(json_bytes(mine.config.to_dict()))
    adapter = load_adapter(workdir)
    ids = run.tokenizer(text)["input_ids"][: ROWS * LENGTH]
    tokens = np.array(ids, np.int32).reshape(ROWS, LENGTH)
    logits, route = logits_of(run.base, run.model, adapter, tokens)
    return SimpleNamespace(
        method=method,
        workdir=workdir,
        adapter=adapter,
        tokens=tokens,
        logits=logits,
        route=route,
        plain=their_logits(theirs, tokens),
        lines=[json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
    )


def only(case, methods):
    if case.method not in methods:
        pytest.skip(f"{case.method} has no such form")


def test_it_learns_and_comes_back_as_it_was(case, perplexity, tmp_path, record):
    losses = [line["cross_entropy"] for line in case.lines if "loss" in line]
    dev = [line["dev_perplexity"] for line in case.lines if "dev_perplexity" in line]
    assert len(losses) == STEPS
    assert np.isfinite([*losses, *dev]).all()
    change = rms(case.logits - case.plain)
    record(PART, "dev perplexity without an adapter", perplexity)
    record(PART, f"{case.method}: dev perplexity after {STEPS} steps", dev[-1])
    record(PART, f"{case.method}: root mean square of what it changes in the logits", change, "> 1e-3")
    assert change > 1e-3, "an adapter that changes nothing shows nothing"
    export_orbax(case.workdir, tmp_path / "orbax")
    assert_equal(load_adapter(tmp_path / "orbax"), case.adapter)
    if not case.adapter.method.portable:
        with pytest.raises(UserError, match="has no portable form"):
            export_milora(case.workdir, tmp_path / "milora")
        return
    export_milora(case.workdir, tmp_path / "milora")
    assert_equal(load_adapter(tmp_path / "milora"), case.adapter)


def test_peft_gives_our_logits(case, folder, theirs, tmp_path, record):
    only(case, IN_PEFT)
    from peft import PeftModel

    export_peft(case.workdir, tmp_path / "peft", str(folder))
    model = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    found = their_logits(model, case.tokens)
    model.unload()
    error = np.abs(found - case.logits).max()
    record(PART, f"{case.method}: largest difference from PEFT's logits", error)
    assert_near(found, case.logits, NEAR)
    np.testing.assert_array_equal(their_logits(theirs, case.tokens), case.plain)
    if case.method in BECOMES:
        import_peft(tmp_path / "peft", folder, tmp_path / "back")
        back = load_adapter(tmp_path / "back")
        assert_equal(dataclasses.replace(back, method=case.adapter.method), case.adapter)
        assert findings(tmp_path / "back", folder) == {tmp_path / "back": []}


def test_torch_gives_our_routes_and_logits(case, theirs, tmp_path, record):
    only(case, IN_TORCH)
    export_milora(case.workdir, tmp_path / "out")
    reader = attach(theirs, tmp_path / "out")
    found = their_logits(theirs, case.tokens)
    reader.detach()
    for layer, weights in reader.weights.items():
        np.testing.assert_allclose(weights.numpy(), np.asarray(case.route.weights[layer, :, 0]), atol=1e-5)
    error = np.abs(found - case.logits).max()
    record(PART, f"{case.method}: largest difference from the torch reader's logits", error)
    assert_near(found, case.logits, NEAR)


def test_a_fixed_route_is_a_lora_for_peft(case, folder, run, theirs, tmp_path, record):
    only(case, ("milora",))
    from peft import PeftModel

    weights = np.asarray(case.route.weights[:, 0, 0])
    export_static(case.workdir, tmp_path / "static", str(folder), weights, {})
    expected = under_route(run, case, weights)
    model = PeftModel.from_pretrained(theirs, tmp_path / "static").eval()
    found = their_logits(model, case.tokens)
    model.unload()
    record(PART, "milora, static: largest difference from PEFT's logits", np.abs(found - expected).max())
    assert_near(found, expected, NEAR)


def under_route(run, case, weights):
    """Our logits under one route for all rows."""
    shares = np.broadcast_to(weights[:, None, None], (len(weights), ROWS, 1, weights.shape[-1]))
    return logits_of(run.base, run.model, case.adapter, case.tokens, route=jnp.asarray(shares))[0]


def test_a_merged_model_is_the_same_here_and_in_transformers(case, folder, run, tmp_path, record):
    """It is rounded to the dtype of the model's own files, so the adapter's logits are near and not equal."""
    only(case, IN_ONE_MODEL)
    weights = np.asarray(case.route.weights[:, 0, 0]) if case.method in IN_TORCH else None
    expected = case.logits if weights is None else under_route(run, case, weights)
    export_merged(case.workdir, folder, tmp_path / "merged", weights, {}, 2**30)
    found = their_logits(torch_model(tmp_path / "merged"), case.tokens)
    assert_near(logits_of(*load_base(tmp_path / "merged"), None, case.tokens)[0], found, NEAR)
    lost, change = rms(found - expected), rms(expected - case.plain)
    record(PART, f"{case.method}, merged: what its rounding loses of the change", lost / change, "< 0.3")
    assert lost < 0.3 * change


@pytest.mark.slow
def test_the_command_writes_a_static_and_a_merged_model(case, tmp_path, monkeypatch, capsys, record):
    """With a route that the rows of a file fix."""
    only(case, ("milora",))
    rows = json.loads((case.workdir / "config.json").read_text())["data"]["train"]
    for kind in ("static", "merged"):
        asked = ["export", "--workdir", str(case.workdir), "--out", str(tmp_path / kind), "--format", kind]
        asked += ["--calibration", rows, "--limit", "8", "--max-new-tokens", "8"]
        monkeypatch.setattr(sys, "argv", ["storage", *asked])
        storage.main()
        assert findings(tmp_path / kind, None) == {tmp_path / kind: []}
        report = json.loads((tmp_path / kind / "export.json").read_text())["static"]["measured"]
    shown = capsys.readouterr().out
    assert shown.count("dev perplexity: base") == 2
    for name in ("perplexity_base", "perplexity_routed", "perplexity_static"):
        record(PART, f"milora, static, {name.replace('_', ' ')} of 8 rows", report[name])
