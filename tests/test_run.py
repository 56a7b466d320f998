"""``milora_jax.train``: what ``train.py`` does, for notebooks and sweeps."""

import dataclasses
import gc
import json
import signal
import sys
import threading

import jax
import pytest

import milora_jax
import train
from milora_jax.adapters.registry import build_method, full_settings
from milora_jax.config import Config
from milora_jax.errors import EXIT_PREEMPTED, NothingLearnedError, Preempted, UserError
from milora_jax.run import TrainResult
from milora_jax.storage.export import export_milora
from milora_jax.training import prepare
from milora_jax.training.workdir import claim_workdir
from tests.models import write_hf_directory
from tests.paths import ROOT

STEPS = 4
TIMES = {"tokens_per_second", "wall_seconds"}
"""Figures of ``summary.json`` that no two runs share."""


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
    """One of the tests' eight devices, for which a step compiles faster."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_mesh = prepare.make_mesh
        monkeypatch.setattr(prepare, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a run, as nested mappings."""
    folder = tmp_path_factory.mktemp("inputs")
    write_hf_directory(folder / "model")
    rows = [{"instruction": f"{i} + 1", "output": f"It is {i + 1}", "answer": f"{i + 1}"} for i in range(24)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text("def letters(predictions, rows):\n    return [*map(len, predictions)]\n")
    file = str(folder / "sums.jsonl")
    return {
        "model": {"path": str(folder / "model")},
        "adapter": {"method": "lora", "rank": 2},
        "data": {"train": file, "dev": file, "test": file, "max_length": 360},
        "train": {"max_steps": STEPS, "batch_size": 8, "eval_every": 2, "log_every": 1, "save_every": 2},
        "eval": {"limit": 3, "batch_size": 8, "max_new_tokens": 3, "metric": f"{folder}/mine.py:letters"},
        "mesh": {"data": 1, "fsdp": 1},
    }


def command_line(settings, workdir):
    """The arguments of ``train.py`` for settings."""
    given = [
        f"--config.{group}.{name}={value}" for group in settings for name, value in settings[group].items()
    ]
    return ["train.py", "--config", str(workdir.parent / "plain.py"), f"--workdir={workdir}", *given]


def write_plain_config(folder):
    """A file of settings that are all the defaults."""
    text = "from milora_jax.config import Config, to_config_dict\n\n\n"
    (folder / "plain.py").write_text(f"{text}def get_config():\n    return to_config_dict(Config())\n")


@pytest.fixture(scope="module")
def by_command(settings, tmp_path_factory):
    """The workdir of a run of ``train.py``."""
    workdir = tmp_path_factory.mktemp("command") / "w"
    write_plain_config(workdir.parent)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", command_line(settings, workdir))
        train.main()
    return workdir


def exported(workdir, out):
    """The bytes of the adapter's portable files, by name."""
    export_milora(workdir, out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def without_times(summary):
    return {name: value for name, value in summary.items() if name not in TIMES}


@pytest.mark.thorough
def test_it_writes_what_the_command_writes_also_when_it_was_stopped(settings, by_command, tmp_path, capfd):
    """In another thread, which could install no handler of a signal, and with nothing printed."""
    asked, ended = [], []

    def stop():
        asked.append(signal.getsignal(signal.SIGTERM))
        return len(trained()) >= 2

    def trained():
        path = tmp_path / "w" / "metrics.jsonl"
        return [line for line in path.read_text().splitlines() if '"loss"' in line] if path.is_file() else []

    def call(**more):
        try:
            ended.append(milora_jax.train(settings, tmp_path / "w", quiet=True, **more))
        except UserError as error:
            ended.append(error)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    for more in ({"stop": stop}, {}):
        thread = threading.Thread(target=call, kwargs=more)
        thread.start()
        thread.join()
    stopped, result = ended
    assert isinstance(stopped, Preempted)
    assert str(stopped) == "stopped: saved step 2, run the same command again to continue"
    assert stopped.exit_code == EXIT_PREEMPTED
    assert set(asked) == {before[signal.SIGTERM]}
    assert {each: signal.getsignal(each) for each in before} == before
    assert isinstance(result, TrainResult)
    assert exported(result.workdir, tmp_path / "a") == exported(by_command, tmp_path / "b")
    assert result.predictions.read_bytes() == (by_command / "predictions.jsonl").read_bytes()
    assert result.summary == json.loads((tmp_path / "w" / "summary.json").read_text())
    theirs = json.loads((by_command / "summary.json").read_text())
    assert without_times(result.summary) == without_times(theirs)
    assert result.accuracy == theirs["accuracy"]["adapter"]
    texts = [each.generated for score in result.scores for each in score.predictions]
    assert result.summary["metric"]["adapter"] == {"sums": sum(map(len, texts)) / 3}
    assert result.summary["metric"]["base"].keys() == {"sums"}
    assert (result.steps, result.best_step) == (STEPS, theirs["best_step"])
    assert [json.loads(line)["step"] for line in result.metrics.read_text().splitlines()] == [
        1,
        2,
        2,
        3,
        4,
        4,
    ]
    assert milora_jax.load_adapter(result.adapter).method.rank == 2
    assert [len(score.predictions) for score in result.scores] == [3]
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.thorough
def test_a_second_call_reports_again_and_leaves_nothing_on_the_devices(settings, by_command, capsys):
    gc.collect()
    before = len(jax.live_arrays())
    config = Config.from_dict(settings)
    first = milora_jax.train(config, str(by_command))
    said = capsys.readouterr()
    assert f"trained already: ended at step {STEPS}" in said.err
    assert f"{STEPS} steps, best at {first.best_step}" in said.out
    assert first.config.adapter.alpha is not None, "the method's settings are not written out"
    gc.collect()
    assert len(jax.live_arrays()) <= before


@pytest.fixture
def begun(settings, tmp_path):
    """A workdir of a run that has written its settings and no more."""
    config = Config.from_dict(settings)
    adapter = full_settings(build_method(config.adapter))
    (tmp_path / "w").mkdir()
    claim_workdir(tmp_path / "w", dataclasses.replace(config, adapter=adapter))
    write_plain_config(tmp_path)
    return tmp_path / "w"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank is 0"),
        ({"adapter": {"rank": 3}}, "holds another run: adapter.rank is 2 there and 3 now"),
        ({"data": {"test": "nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
        ({"model": {"path": "nowhere"}}, "no such directory"),
    ],
)
def test_a_refusal_is_the_line_of_the_command(settings, begun, change, wrong, monkeypatch, refused):
    changed = {group: {**values, **change.get(group, {})} for group, values in settings.items()}
    monkeypatch.setattr(sys, "argv", command_line(changed, begun))
    line = refused(lambda _: train.main())
    assert wrong in line
    with pytest.raises(UserError) as caught:
        milora_jax.train(changed, begun)
    assert f"error: {caught.value}" == line


def test_an_unknown_setting_and_what_the_file_system_refuses_are_one_line(settings, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"unknown setting config.train.step \(did you mean"):
        milora_jax.train({"train": {"step": 3}}, tmp_path)

    def refuses(tests, log):
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    monkeypatch.setattr("milora_jax.run.check_tests", refuses)
    with pytest.raises(UserError, match=r"^rows.jsonl: Permission denied$"):
        milora_jax.train(settings, tmp_path / "w", quiet=True)


@pytest.mark.thorough
def test_a_run_that_has_learned_nothing_raises_after_all_is_written(settings, by_command, monkeypatch):
    """As the command ends with code 4."""
    monkeypatch.setattr(
        "milora_jax.training.progress.Progress.saturated", lambda self, guess: "it is spoiled"
    )
    monkeypatch.setattr(
        "milora_jax.training.progress.Progress.unlearned", lambda self, guess, name="": "spoiled"
    )
    with pytest.raises(NothingLearnedError, match="nothing was learned: spoiled"):
        milora_jax.train(settings, by_command, quiet=True)
    assert json.loads((by_command / "summary.json").read_text())["not_learned"] == "spoiled"


def test_handlers_of_signals_are_installed_where_asked_for_and_for_the_call_only(
    settings, tmp_path, monkeypatch
):
    during, before = [], signal.getsignal(signal.SIGTERM)

    def look(tests, log):
        during.append(signal.getsignal(signal.SIGTERM))
        raise UserError("enough")

    monkeypatch.setattr("milora_jax.run.check_tests", look)
    for asked in (False, True):
        with pytest.raises(UserError, match="enough"):
            milora_jax.train(settings, tmp_path / "w", handle_signals=asked, quiet=True)
    assert (during[0] == before, during[1] == before) == (True, False)
    assert signal.getsignal(signal.SIGTERM) == before

    refusals = []

    def call():
        with pytest.raises(UserError, match="handle_signals is True: expected False outside of the main"):
            milora_jax.train(settings, tmp_path / "w", handle_signals=True)
        refusals.append(True)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert refusals


def test_train_py_asks_for_the_handlers_and_for_the_cluster(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        milora_jax, "train", lambda *given, **named: asked.update(given=given, **named), False
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(ROOT / "configs/tiny.py")])
    train.main()
    assert asked["handle_signals"] is True
    assert asked["cluster"] is not None
    assert "quiet" not in asked
