"""What the doctor says of the routers of a run, from its last dev evaluation."""

import dataclasses
import json

import pytest

from milora_jax.doctor.findings import OK, WARN
from milora_jax.doctor.subject import Subject
from milora_jax.doctor.workdir import workdir_findings
from tests.doctor.runs import config_of, write_inputs, write_workdir
from tests.models import TINY

LAYERS = TINY.num_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("run")
    write_inputs(made)
    write_workdir(made, config_of(made))
    return made


def finding(folder, features, *lines, torn=""):
    text = "".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(lines, 1))
    (folder / "metrics.jsonl").write_text(text + torn)
    config = config_of(folder)
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, features=features))
    found = [each for each in workdir_findings(Subject(None, config, folder)) if each.check == "routers"]
    assert len(found) <= 1
    return found[0] if found else None


def seen(common, pooler=0.2):
    return {
        "route_common": [common] * LAYERS,
        "pooler_share": [pooler] * LAYERS,
        "feature_spread": [1.5] * LAYERS,
    }


def test_blind_and_saturated_routers_are_a_warning_with_what_to_do(folder):
    blind = finding(folder, "rms", seen(0.3), {"loss": 1.0}, seen(0.99))
    assert blind.level == WARN
    assert blind.text.startswith(
        f"step 3: 99% of the dev prompts share one route in {LAYERS} of {LAYERS} layers; "
    )
    assert "adapter.features=standardized" in blind.text
    assert "one token has 90% or more of the pooler" in finding(folder, "rms", seen(0.3, 0.97)).text


def test_seeing_routers_are_fine_and_the_drift_is_said(folder):
    found = finding(folder, "standardized", seen(0.99), seen(0.25), torn='{"step": 3, "rou')
    assert found.level == OK
    assert found.text == (
        "step 2: 25% of the dev prompts have a layer's commonest route, mean over layers; "
        "features 1.50 times as spread as they were measured"
    )


def test_a_log_without_routes_says_nothing(folder):
    assert finding(folder, "rms", {"loss": 1.0}) is None
