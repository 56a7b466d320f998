"""Runs with a preference objective learn, resume to the bit, keep their reference, and refuse bad rows."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.modules import frozen_kernels
from milora_jax.config import AdapterSection, Config, DataSection, MeshSection, ModelSection, TrainSection
from milora_jax.errors import Preempted, UserError
from milora_jax.evaluation.final import require_learned
from milora_jax.parallel.rules import attend_over
from milora_jax.tiny import MODEL_DIR, TASKS_DIR
from milora_jax.tiny.preferences import make_preferences
from milora_jax.training.prepare import prepare_run
from milora_jax.training.progress import planned_steps
from milora_jax.training.start import reference_adapter
from milora_jax.training.step import init_state, make_steps
from tests.models import write_hf_directory
from tests.training.runs import life
from tests.training.short_runs import SHALLOW, SHORT, STEPS, STOP, fit, on_one_device, silent

PAIRS = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"{i} {i} {i}"} for i in range(20)]
JUDGED = [{"prompt": f"say {i}", "completion": f"{i} " * (1 + i % 2), "label": i % 2 == 0} for i in range(20)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    write_hf_directory(folder / "model", SHALLOW)
    write(folder / "pairs.jsonl", PAIRS)
    write(folder / "judged.jsonl", JUDGED)
    return folder


def config_of(folder, objective="dpo", rows="pairs.jsonl", adapter=None, data=None, **train):
    settings = TrainSection(**{**SHORT, "objective": objective, "log_every": 2, **train})
    return Config(
        model=ModelSection(path=str(folder / "model")),
        adapter=AdapterSection(rank=4, **(adapter or {})),
        data=DataSection(train=str(folder / rows), dev_share=0.2, max_length=360, **(data or {})),
        train=settings,
    )


def programs(run):
    return make_steps(run.model, run.config.train, planned_steps(run.config.train, len(run.train)))


def lines_of(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


def params_of(fitted):
    return jax.tree.map(np.asarray, fitted.state.adapter.params)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("objective", "rows", "method"), [("dpo", "pairs.jsonl", "milora"), ("kto", "judged.jsonl", "lora")]
)
def test_a_stopped_run_ends_with_the_bits_of_an_undisturbed_one(objective, rows, method, folder, tmp_path):
    config = config_of(folder, objective, rows, {"method": method, "dropout": 0.1}, {"pack": True})
    run = on_one_device(prepare_run(config, None, silent))
    steps = programs(run)
    whole = fit(run, steps, tmp_path / "whole")
    with pytest.raises(Preempted):
        fit(run, steps, tmp_path / "stopped", stop_after=STOP)
    resumed = fit(run, steps, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, params_of(resumed), params_of(whole))
    assert resumed.progress.best_perplexity == whole.progress.best_perplexity
    (first, *_, last) = lines_of(tmp_path / "whole", "dev_loss")
    assert last["dev_loss"] < first["dev_loss"]
    assert lines_of(tmp_path / "whole", "rewards/margins")[-1]["rewards/accuracies"] >= 0.5
    assert ("kl" in lines_of(tmp_path / "whole", "loss")[-1]) == (objective == "kto")
    require_learned(run, whole)


@pytest.mark.thorough
@pytest.mark.parametrize(("objective", "rows"), [("dpo", "pairs.jsonl"), ("kto", "judged.jsonl")])
def test_a_step_over_eight_devices_is_that_of_one(objective, rows, folder):
    config = config_of(folder, objective, rows, {"method": "lora"})
    config = dataclasses.replace(config, mesh=MeshSection(data=4, fsdp=2))
    whole = prepare_run(config, None, silent)
    assert whole.mesh.size == 8
    found = []
    for run in (whole, on_one_device(whole)):
        method, shape = build_method(config.adapter), adapter_shape(run.model)
        adapter = init_adapter(method, jax.random.key(0), shape, frozen_kernels(run.base))
        state = init_state(adapter, jax.random.key(1), config.train, STEPS)
        steps = make_steps(run.model, config.train, STEPS, attend=attend_over(run.mesh))
        for _ in range(2):
            state, metrics = steps.train(state, run.base, run.batch(run.train, range(8)))
        found.append((jax.device_get(state.adapter.params), jax.device_get(metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *found)
    assert found[0][1].preference.prompts == 8


@pytest.mark.thorough
def test_the_start_is_the_reference_and_must_stay_what_it_was(folder, tmp_path):
    lora = {"method": "lora"}
    run = on_one_device(prepare_run(config_of(folder, adapter=lora), None, silent))
    fit(run, programs(run), tmp_path / "first")
    config = config_of(folder, adapter=lora, init_from=str(tmp_path / "first"))
    (tmp_path / "first" / "config.json").write_text(json.dumps(run.config.to_dict()))
    run = on_one_device(prepare_run(config, None, silent))
    steps = programs(run)
    with pytest.raises(Preempted):
        fit(run, steps, tmp_path / "second", stop_after=STOP)
    # Policy and reference are equal before the first step, so its loss is that of a coin.
    np.testing.assert_allclose(first_loss(run, steps), np.log(2.0), rtol=1e-5)
    moved = dataclasses.replace(run.config.train, init_from=str(tmp_path / "second"))
    (tmp_path / "second" / "config.json").write_text(json.dumps(run.config.to_dict()))
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, train=moved))
    with pytest.raises(UserError, match=r"the reference adapter, train\.init_from, changed since step 3"):
        fit(other, steps, tmp_path / "second")


def first_loss(run, steps):
    reference, _ = reference_adapter(run.config, run.model, run.mesh)
    sums, _ = steps.evaluate(reference, run.base, run.batch(run.dev, range(4)), reference)
    return float(sums.loss) / int(sums.prompts)


@pytest.mark.thorough
def test_the_tiny_model_learns_to_prefer_the_shorter_answer(tmp_path):
    rows = TASKS_DIR / "preferences"
    settings = TrainSection(
        objective="dpo", max_steps=12, batch_size=8, learning_rate=2e-3, eval_every=6, coefficient_every=20
    )
    config = Config(
        model=ModelSection(path=str(MODEL_DIR)),
        adapter=AdapterSection(method="lora"),
        data=DataSection(
            train=str(rows / "train.jsonl"), dev=str(rows / "dev.jsonl"), special_tokens="bos", max_length=160
        ),
        train=settings,
    )
    run = on_one_device(prepare_run(config, None, silent))
    fit(run, programs(run), tmp_path / "run")
    last = lines_of(tmp_path / "run", "dev_loss")[-1]
    assert last["dev_rewards/accuracies"] > 0.9
    assert last["dev_rewards/margins"] > 0.5


def test_the_pairs_of_the_package_are_those_of_the_command():
    from milora_jax.commands.tiny import SEED

    for split, pairs in make_preferences(SEED).items():
        lines = (TASKS_DIR / "preferences" / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == pairs
        assert len({pair["prompt"] for pair in pairs}) == len(pairs)


def test_prepared_rows_give_the_batches_of_rows_in_memory(folder, tmp_path):
    for rows, objective in (("pairs.jsonl", "dpo"), ("judged.jsonl", "kto")):
        found = []
        for data in ({}, {"prepared_path": str(tmp_path / "prepared")}):
            run = on_one_device(prepare_run(config_of(folder, objective, rows, data=data), None, silent))
            found.append((run.batch(run.train, range(4)), run.token_fingerprint, run.data_fingerprint))
        jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
        assert found[0][1:] == found[1][1:]
        assert (found[0][0].answers, found[0][0].prompts, len(run.train)) == (2, 1, 16)


@pytest.mark.parametrize(
    ("objective", "rows", "message"),
    [
        ("dpo", [*PAIRS, {**PAIRS[0], "rejected": "0"}], "bad.jsonl:21: fields 'chosen' and 'rejected' are"),
        (
            "dpo",
            [*PAIRS, {**PAIRS[0], "rejected": "x" * 400}],
            "bad.jsonl:21: the prompt with 'rejected' has",
        ),
        ("kto", PAIRS, "bad.jsonl:1: field 'completion' holds nothing"),
        ("sft", PAIRS, "bad.jsonl:1: field 'chosen' is not supported: it is of pairs"),
    ],
)
def test_bad_rows_end_a_run_before_it_begins(objective, rows, message, folder, tmp_path):
    write(folder / "bad.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prepare_run(config_of(folder, objective, "bad.jsonl"), tmp_path / "run", silent)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_the_command_ends_with_one_line_and_exit_code_2(folder, tmp_path):
    write(folder / "rows.jsonl", [*PAIRS, {**PAIRS[0], "label": True, "chosen": ""}])
    done = life(folder, tmp_path / "run", **{"train.objective": "orpo"})
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("rows.jsonl:21: field 'chosen' is empty")
    assert not (tmp_path / "run").exists()


def test_a_setting_of_chats_that_no_preference_reads_is_refused(folder, tmp_path):
    config = config_of(folder, data={"train_on": "last"})
    with pytest.raises(UserError, match=r"data\.train_on is 'last': expected 'all': objective 'dpo'"):
        prepare_run(config, tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()
