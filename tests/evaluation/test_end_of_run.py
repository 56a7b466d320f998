"""What is said and written at the end of a run is what there is."""

import dataclasses
import json
import shlex
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from milora_jax.adapters.registry import METHODS, build_method
from milora_jax.base.fingerprint import base_fingerprint
from milora_jax.commands import storage
from milora_jax.config import AdapterSection, Config, DataSection, ModelSection
from milora_jax.errors import EXIT_NOTHING_LEARNED, NothingLearnedError
from milora_jax.evaluation import final
from milora_jax.evaluation.score import Prediction, TaskScore, compact_route, figures
from milora_jax.prompt_format import PromptFormat
from milora_jax.storage.adapters import adapter_metadata
from milora_jax.storage.checkpoint import CheckpointDirectory
from milora_jax.training.prepare import Run
from milora_jax.training.progress import Fit, Progress
from milora_jax.training.step import TrainState
from tests.models import SMALL, TINY, random_base, write_hf_directory
from tests.storage.adapters import noisy_adapter

LEARNED = Progress(best_step=7, best_perplexity=2.0, first_perplexity=9.0, last_perplexity=3.0, seconds=1.0)
SPOILED = dataclasses.replace(LEARNED, best_perplexity=97.0, last_perplexity=97.0)
COLLAPSED = dataclasses.replace(LEARNED, last_perplexity=97.0)
NOT_BETTER = dataclasses.replace(LEARNED, best_perplexity=9.5, last_perplexity=9.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, TINY, tokenizer=False)
    return folder


def report(workdir, model, method="lora", progress=LEARNED):
    """Write the report of a finished run whose adapter is random.

    Returns:
      The run and what training gave back.
    """
    adapter = noisy_adapter(random_base(TINY), TINY, method)
    best = CheckpointDirectory(workdir / "best", 1, print)
    share = np.full((TINY.num_layers, 7), 3 / 7).tolist() if adapter.method.routes else None
    found = {"dev_perplexity": progress.best_perplexity, "expert_share": share, "tunable_parameters": 10}
    metadata = adapter_metadata(
        adapter.method, adapter.shape, base_fingerprint(model), "none", PromptFormat()
    )
    best.save(7, adapter.params, {**metadata, **found})
    best.wait()
    health = {
        "route_entropy": [1.0] * TINY.num_layers,
        "expert_first": share,
        "route_margin": None,
        "route_changed": None,
    }
    line = {"step": 7, "dev_perplexity": 2.0, **(health if adapter.method.routes else {})}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    settings = AdapterSection(method=method, **SMALL[method])
    config = Config(
        model=ModelSection(path=str(model)), data=DataSection(test="rows.jsonl"), adapter=settings
    )
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    route = compact_route(np.eye(TINY.num_layers, 7)) if adapter.method.routes else None
    score = TaskScore("rows", [Prediction("rows", 0, "a", "b", "c", "exact", "c", False, False, route)])
    facts = {"guess": TINY.vocab_size, "measure": "dev perplexity", "dev_tests": {}}
    run = Mock(spec=Run, config=config, model=TINY, **facts)
    fit = Fit(Mock(spec=TrainState), 7, progress, 0.0)
    final.write_report(run, workdir, fit, {**figures([score]), "answers": {}}, [score], 1.0)
    return run, fit


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_every_file_is_there_and_the_export_is_one_the_method_has(
    method, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(final, "_example", lambda run, score: "")
    report(tmp_path, model, method)
    lines = capsys.readouterr().out.splitlines()
    (named,) = (line for line in lines if line.startswith(f"written to {tmp_path}: "))
    names = [name.split(" (")[0] for name in named.partition(": ")[2].split(", ")]
    assert all((tmp_path / name).exists() for name in names)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {name for name in names if name.endswith(".png")}
    routes = build_method(AdapterSection(method=method)).routes
    assert pictures == ({"routing.png", "routing_health.png"} if routes else set())
    (export,) = (line for line in lines if "milora_jax.storage export" in line)
    monkeypatch.setattr(sys, "argv", shlex.split(export)[2:])
    storage.main()
    assert any((tmp_path / "export").iterdir())


@pytest.mark.parametrize(
    ("progress", "said", "ends"),
    [
        (LEARNED, "", False),
        (SPOILED, "", True),
        (NOT_BETTER, "warning: nothing was learned: no dev perplexity was below", False),
        (COLLAPSED, "warning: training broke down after step 7, whose adapter is the best", False),
    ],
    ids=["learned", "spoiled", "not better", "collapsed after it had learned"],
)
def test_a_run_says_what_became_of_it(progress, said, ends, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(final, "_example", lambda run, score: "")
    run, fit = report(tmp_path, model, progress=progress)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == bool(said)
    assert all(line.startswith(said) for line in warnings)
    reason = json.loads((tmp_path / "summary.json").read_text())["not_learned"]
    assert bool(reason) == (progress in (SPOILED, NOT_BETTER))
    if not ends:
        final.require_learned(run, fit)
        return
    with pytest.raises(NothingLearnedError, match="nothing was learned: no dev") as caught:
        final.require_learned(run, fit)
    assert caught.value.exit_code == EXIT_NOTHING_LEARNED
    assert reason in str(caught.value)
