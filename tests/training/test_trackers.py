"""TensorBoard and Weights & Biases show what metrics.jsonl holds, and never cost a run."""

import dataclasses
import json
import struct
import sys
import types

import numpy as np
import pytest

from milora_jax.config import Config, TrainSection
from milora_jax.errors import Preempted, UserError
from milora_jax.training import trackers
from milora_jax.training.trackers import (
    SHARES,
    TAGS,
    TENSORBOARD_FOLDER,
    RunLog,
    heat_map,
    require_installed,
    scalars,
)
from tests.training.short_runs import STEPS, STOP, fit

SHARE = np.linspace(0, 1, 14).reshape(2, 7).tolist()
BLOCK, WHOLE, LAST = 32768, 1, 4
"""Of LevelDB's log format: bytes of a block, and the kinds of pieces with which a record ends."""
DEV = {"dev_perplexity": 2.0, "expert_share": SHARE, "route_entropy": [1.0, 1.5], "route_margin": None}


def events(workdir):
    """What the event files hold, file by file in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((workdir / TENSORBOARD_FOLDER).iterdir()):
        content, at, found = path.read_bytes(), 0, []
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
        yield found


def shown(workdir):
    """(step, tag) of every value shown: a session that starts at a step takes back what was later."""
    kept = []
    for file in events(workdir):
        for event in file:
            if event.HasField("session_log"):
                kept = [pair for pair in kept if pair[0] < event.step]
            kept += [(event.step, value.tag) for value in event.summary.value]
    return kept


def config_of(names):
    return Config(train=TrainSection(trackers=names))


def run_log(workdir, names="tensorboard", step=0, said=None):
    said = [] if said is None else said
    workdir.mkdir(exist_ok=True)
    return RunLog(workdir, config_of(names), step, said.append)


def test_names_are_checked_and_none_is_the_default():
    assert TrainSection().trackers == ""
    assert config_of("wandb, tensorboard").train.trackers == "wandb, tensorboard"
    with pytest.raises(UserError, match=r"train.trackers is 'tensorbord'.*did you mean 'tensorboard'"):
        TrainSection(trackers="wandb,tensorbord")


def test_one_that_is_not_installed_is_refused_before_a_run(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    require_installed("")
    with pytest.raises(
        UserError, match=r"'wandb' needs the package wandb: pip install 'milora-jax\[wandb\]'"
    ):
        require_installed("wandb")


def test_figures_are_curves_and_shares_pictures():
    found = dict(scalars({**DEV, "loss": 0.5, "new_figure": 1}))
    assert found["train/loss"] == 0.5
    assert found["routing/entropy"] == 1.25
    assert found["new_figure"] == 1.0
    assert "routing/margin" not in found
    assert found["routing/expert_share/down"] == pytest.approx((SHARE[0][6] + SHARE[1][6]) / 2)
    small, deep = (heat_map(np.zeros((layers, 7), np.float32)) for layers in (2, 32))
    assert small.shape[2] == 3
    assert deep.shape[0] > small.shape[0]
    assert (heat_map(np.ones((2, 7), np.float32)) != small).any()


def test_event_files_hold_curves_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    log = run_log(tmp_path)
    log.log(1, {"loss": 0.5})
    log.log(2, DEV)
    log.close()
    (file,) = events(tmp_path)
    values = {(event.step, v.tag): v for event in file for v in event.summary.value}
    assert values[1, "train/loss"].simple_value == 0.5
    assert values[2, "dev/perplexity"].simple_value == 2.0
    picture = values[2, "routing/expert_share"].image
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert picture.width > 100


def test_a_resumed_run_doubles_no_step(tmp_path):
    pytest.importorskip("tensorboardX")
    log = run_log(tmp_path)
    for step in (1, 2, 3, 4):
        log.log(step, {"loss": float(step)})
    # Killed here, after the checkpoint of step 2: nothing is closed.
    again = run_log(tmp_path, step=2)
    for step in (3, 4, 5):
        again.log(step, {"loss": float(step)})
    again.close()
    log.close()
    assert shown(tmp_path) == [(step, "train/loss") for step in (1, 2, 3, 4, 5)]
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5]


class Service(types.ModuleType):
    """What we use of wandb, and what it was told."""

    def __init__(self, error=None):
        super().__init__("wandb")
        self.inits, self.logged, self.finished, self.error = [], [], 0, error
        self.url = "https://example.invalid/run"

    Settings = dict
    offline = False
    Image = staticmethod(lambda pixels: ("picture", pixels.shape[2]))

    def init(self, **given):
        self.inits.append(given)
        if self.error:
            raise self.error
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_goes_on_under_one_id_and_is_told_no_step_twice(tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    said = []
    log = run_log(tmp_path, "wandb", said=said)
    for step in (1, 2, 3):
        log.log(step, {"loss": 0.5})
    again = run_log(tmp_path, "wandb", step=1, said=said)
    for step, values in ((2, {"loss": 0.5}), (3, {"loss": 0.5}), (4, DEV)):
        again.log(step, values)
    again.close()
    assert [step for step, _ in service.logged] == [1, 2, 3, 4]
    assert service.logged[-1][1]["routing/expert_share"] == ("picture", 3)
    one, other = service.inits
    assert one["id"] == other["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (one["resume"], one["project"], one["name"]) == ("allow", "milora_jax", tmp_path.name)
    assert one["config"]["train"]["trackers"] == "wandb"
    assert service.finished == 1
    assert said == ["Weights & Biases: https://example.invalid/run"] * 2


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_one_that_fails_is_given_up_with_one_line(when, tmp_path, monkeypatch):
    service, said = Service(), []

    def fail(*given, **more):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(service, when, fail)
    monkeypatch.setitem(sys.modules, "wandb", service)
    log = run_log(tmp_path, "wandb", said=said)
    for step in (1, 2):
        log.log(step, {"loss": 0.5})
    log.close()
    assert said[-1] == "train.trackers: wandb is given up, metrics.jsonl goes on: no route to host"
    assert len(said) == (1 if when == "init" else 2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_other_processes_track_nothing(tmp_path, monkeypatch):
    for module in (trackers, sys.modules["milora_jax.training.workdir"]):
        monkeypatch.setattr(module, "is_first", lambda: False)
    log = run_log(tmp_path, "tensorboard,wandb")
    log.log(1, {"loss": 0.5})
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_a_run_that_is_stopped_and_resumed_is_one_run_in_tensorboard(prepared, tmp_path):
    """Every figure of metrics.jsonl has a name, and every step is there once."""
    pytest.importorskip("tensorboardX")
    run, steps = prepared
    train = dataclasses.replace(run.config.train, trackers="tensorboard", log_every=1)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    with pytest.raises(Preempted):
        fit(run, steps, tmp_path, stop_after=STOP)
    fit(run, steps, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Objectives of preference and answers to the dev rows have figures of their own.
    others = {
        name for name in TAGS if "rewards/" in name or name in ("kl", "dev_kl", "dev_loss", "dev_answers")
    }
    assert {name for line in lines for name in line} - {"step"} == (TAGS.keys() | SHARES.keys()) - others
    found = shown(tmp_path)
    assert len(found) == len(set(found))
    assert [step for step, tag in found if tag == "train/loss"] == list(range(1, STEPS + 1))
    assert [step for step, tag in found if tag == "routing/expert_share"] == [2, 4, 6]


@pytest.mark.thorough
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """The real client: two lives of one run, read back from what it wrote."""
    pytest.importorskip("wandb", reason="needs pip install 'milora-jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    for start, stop in ((0, 3), (2, 5)):
        log = run_log(tmp_path, "wandb", step=start, said=said)
        for step in range(start + 1, stop + 1):
            log.log(step, {"loss": 1.0 / step, **DEV})
        log.close()
    assert all(line.startswith("Weights & Biases: wandb sync") for line in said), said
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert len(runs) == 2
    assert all(path.name.endswith(run_id) for path in runs)
    assert [list(steps_of(path / f"run-{run_id}.wandb")) for path in runs] == [[1, 2, 3], [4, 5]]


def steps_of(path):
    """The steps in a file of wandb's: a head of 7 bytes, then records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole, at = whole + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                yield record.history.step.num
