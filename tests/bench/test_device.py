"""``bench device`` measures what fits into its time, loses no row, and goes on where it stopped."""

import json
import subprocess
import sys
import time

import pytest

from milora_jax.base.known import SHAPES
from milora_jax.bench import device
from milora_jax.bench.device_rows import ACCELERATOR, REHEARSAL, Prediction, Row, rows_of
from milora_jax.bench.device_table import as_markdown
from milora_jax.errors import UserError
from tests.paths import ROOT

MACHINE = {
    "device": "fast",
    "devices": 1,
    "model": "random:llama-30m",
    "dtype": "float32",
    "versions": {"jax": "1", "jaxlib": "2"},
    "backend": "cpu",
    "peers": False,
}


class Clock:
    """A clock that only rows move."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def machine(monkeypatch):
    """A machine without a process: rows take as long as a test says, and fail where it says so."""
    clock, seconds, errors, run, starts = Clock(), {}, {}, [], []

    class Worker:
        def __init__(self, settings, bound):
            starts.append(clock.now)
            self.machine = MACHINE

        def run(self, row, bound):
            run.append(row.name)
            takes = seconds.get(row.name, 4.0)
            clock.now += min(takes, bound)
            if takes > bound:
                raise device.Late
            if errors.get(row.name) == "crash":
                raise UserError("the process ended with code -9: nothing was said")
            if row.name in errors:
                return {"error": errors[row.name], "seconds": takes}
            report = (
                {"bandwidth": 1e12, "matmul": 1e15} if row.kind == "ceilings" else {"ok": True, "checks": []}
            )
            return {"report": report, "seconds": takes}

        def close(self):
            pass

    monkeypatch.setattr(device, "Worker", Worker)
    monkeypatch.setattr(device, "time", clock)
    monkeypatch.setattr(device, "seconds_since_start", lambda: 0.0)
    return type(
        "Machine", (), {"clock": clock, "seconds": seconds, "errors": errors, "run": run, "starts": starts}
    )


NAMES = [row.name for row in rows_of(REHEARSAL, peers=False)]


def statuses(reports):
    return {each["row"]: each["status"] for each in reports}


def test_it_ends_in_time_and_a_second_call_goes_on(machine, tmp_path):
    settings = device.Settings(minutes=0.8, out=tmp_path / "d.json")
    first = statuses(device.measure(settings))
    assert machine.clock.now - 1000 <= 48 - device.ENDING
    done = [name for name in NAMES if first[name] == "done"]
    assert done == machine.run == NAMES[: len(done)], "the most important ones, in their order"
    assert 5 < len(done) < len(NAMES)
    assert {first[name] for name in NAMES[len(done) :]} == {"no time"}
    for _ in range(3):
        begin = machine.clock.now
        statuses(device.measure(settings))
        assert machine.clock.now - begin <= 48 - device.ENDING
    assert machine.run == NAMES, "every row once"
    held = json.loads((tmp_path / "d.json").read_text())
    assert list(held["rows"]) == NAMES
    assert held["machine"] == MACHINE


def test_a_row_that_fails_costs_itself(machine, tmp_path):
    machine.errors.update({NAMES[0]: "XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory", NAMES[2]: "crash"})
    settings = device.Settings(minutes=30, out=tmp_path / "d.json")
    found = statuses(device.measure(settings))
    assert [name for name in NAMES if found[name] == "failed"] == [NAMES[0], NAMES[2]]
    assert [name for name in NAMES if found[name] == "done"] == [NAMES[1], *NAMES[3:]]
    assert len(machine.starts) == 2, "a new worker after the one that crashed"
    assert not list(device.measure(settings)), "nothing is left"
    machine.errors.clear()
    again = device.Settings(minutes=30, out=tmp_path / "d.json", again=True)
    assert statuses(device.measure(again)) == {NAMES[0]: "done", NAMES[2]: "done"}


def test_a_row_that_hangs_is_ended_and_tried_again_with_more_time(machine, tmp_path):
    machine.seconds[NAMES[3]] = 300.0
    settings = device.Settings(minutes=5, out=tmp_path / "d.json")
    found = statuses(device.measure(settings))
    assert found[NAMES[3]] == "late"
    assert machine.clock.now - 1000 <= 300 - device.ENDING
    assert found[NAMES[4]] == "done"
    held = json.loads((tmp_path / "d.json").read_text())["rows"][NAMES[3]]
    short = device.Settings(minutes=held["seconds"] / 60, out=tmp_path / "d.json")
    assert statuses(device.measure(short))[NAMES[3]] == "no time"
    machine.seconds.clear()
    assert statuses(device.measure(settings))[NAMES[3]] == "done"


def test_what_was_before_counts(machine, tmp_path, monkeypatch):
    assert device.seconds_since_start() == 0
    monkeypatch.setattr(device, "seconds_since_start", lambda: 30.0)
    list(device.measure(device.Settings(minutes=0.8, out=tmp_path / "d.json")))
    assert 0 < machine.clock.now - 1000 <= 18 - device.ENDING


def test_a_process_knows_when_it_was_started():
    code = "from milora_jax.bench import device; print(device.seconds_since_start())"
    begin = time.monotonic()
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.1 < float(result.stdout) <= time.monotonic() - begin + 0.02  # ticks of the kernel


def test_a_file_of_another_machine_is_refused(machine, tmp_path):
    settings = device.Settings(out=tmp_path / "d.json")
    list(device.measure(settings))
    held = json.loads(settings.out.read_text())
    held["machine"]["device"] = "slow"
    settings.out.write_text(json.dumps(held))
    with pytest.raises(UserError, match="has results of device 'slow', and this is 'fast'"):
        list(device.measure(settings))
    settings.out.write_text("{}")
    with pytest.raises(UserError, match="expected a file of this command"):
        list(device.measure(settings))


def test_time_is_predicted_from_what_was_measured():
    config = SHAPES["llama2-7b"]
    by_name = {row.name: row for row in rows_of(ACCELERATOR, peers=True)}
    one, many = by_name["decode, batch 1, MiLoRA"], by_name["decode, batch 128, MiLoRA, 128 tenants"]
    ceilings = {
        "kind": "ceilings",
        "options": {},
        "seconds": 1.0,
        "report": {"bandwidth": 4e12, "matmul": 7e14},
    }
    before = Prediction(config, 2, "gpu", [ceilings])
    bytes_of_step = 2 * config.matrix_parameters
    at_ceiling = 4 * (2 * bytes_of_step * 448 / 7e14 + 64 * bytes_of_step / 4e12)
    assert before.seconds(one) == pytest.approx(40 + 2 * at_ceiling)
    assert before.seconds(many) > before.seconds(one)
    done = {"kind": "decode", "options": dict(one.options), "seconds": 90.0, "report": {}}
    after = Prediction(config, 2, "gpu", [ceilings, done])
    assert after.seconds(one) == pytest.approx(90 - at_ceiling + 2 * at_ceiling)
    halved = Row("", "decode", {**one.options, "quantize": "int8"})
    assert before.seconds(halved) < before.seconds(one)


def test_rows_are_those_of_the_issue():
    names = [row.name for row in rows_of(ACCELERATOR, peers=True)]
    assert len(names) == len(set(names))
    assert names[:2] == ["kernels against their references", "ceilings"]
    for batch in (1, 8, 32, 128):
        assert f"decode, batch {batch}, base alone" in names
    assert "train, 4 x 2048, MiLoRA" in names
    assert [name for name in names if "PEFT" in name] == names[-3:]


def test_the_table():
    def done(kind, seconds, **report):
        return {"status": "done", "kind": kind, "report": report, "seconds": seconds}

    checks = [{"check": "x", "ok": True}, {"check": "y", "ok": False}]
    rows = {
        "a": done("checks", 20.0, ok=False, checks=checks),
        "b": done("checks", 20.0, ok=True, checks=checks[:1]),
        "c": done("ceilings", 2.0, bandwidth=4.1e12, matmul=7e14),
        "d": done("decode", 30.25, decode_tok_s=1234.5, ms_per_step=6.4789, roofline_share=0.8123),
        "e": done("prefill", 9.0, tok_s=55.0, prefill_ms=37.2, matmul_share=0.5),
        "f": done("train", 9.0, tok_s=77.0, ms_per_step=1500.0, matmul_share=0.75),
        "g": {"status": "failed", "kind": "decode", "error": "A: b | c", "seconds": 3.0},
        "h": {"status": "late", "kind": "train", "seconds": 61.0},
    }
    head, _, *lines = as_markdown(MACHINE, rows).splitlines()
    assert head == "1 x fast, `random:llama-30m` in float32, jax 1, jaxlib 2:"
    assert lines[2:] == [
        "| a | not equal: y |  |  | 20 |",
        "| b | all 1 equal |  |  | 20 |",
        "| c | 4100 GB/s, 700.00 TFLOP/s |  |  | 2 |",
        "| d | 1234 | 6.48 | 0.81 | 30.2 |",
        "| e | 55 | 37.2 | 0.50 | 9 |",
        "| f | 77 | 1500 | 0.75 | 9 |",
        "| g | failed: A: b \\| c |  |  | 3 |",
        "| h | was not done in time |  |  | 61 |",
    ]


def test_kernels_equal_their_references_and_one_that_fails_is_named(monkeypatch):
    from milora_jax.bench import device_checks

    checks = [each for each in device_checks._checks("cpu") if each[0].startswith("int8 product of 1 rows")]
    assert len(checks) == 2

    def broken():
        raise RuntimeError("cannot lower\nmore")

    def wrong():
        result, reference = checks[0][2]()
        return result.at[0, 0].add(0.1 * abs(reference).max()), reference

    checks += [("broken", "float32", broken), ("wrong", "float32", wrong)]
    monkeypatch.setattr(device_checks, "_checks", lambda backend: iter(checks))
    found = device_checks.check_all()
    assert [each["ok"] for each in found["checks"]] == [True, True, False, False]
    assert not found["ok"]
    assert found["checks"][2]["error"] == "RuntimeError: cannot lower"


@pytest.mark.thorough
def test_a_worker_runs_every_kind_of_row(tmp_path):
    """The tiny model, the shortest lengths: a decoding row, prefill, training, and one that cannot run."""
    from milora_jax.tiny import MODEL_DIR

    settings = device.Settings(model=str(MODEL_DIR), dtype="float32")
    worker = device.Worker(settings, 300.0)
    try:
        assert worker.machine["backend"] == "cpu"
        variant = {
            **{"method": "milora", "batch": 2, "beams": 1, "tenants": 2, "rank": 14, "top_k": 3},
            **{"quantize": "none", "prompt": 4, "new": 3},
        }
        decoded = worker.run(Row("", "decode", variant), 300.0)["report"]
        assert decoded["decode_tok_s"] > 0 < decoded["roofline_share"]
        assert decoded["path"] == "gathered"
        filled = worker.run(Row("", "prefill", {**variant, "prompt": 8, "new": 2}), 300.0)["report"]
        assert filled["tok_s"] == pytest.approx(16e3 / filled["prefill_ms"])
        impossible = worker.run(Row("", "decode", {**variant, "prompt": 10**6}), 300.0)
        assert "error" in impossible
        step = {
            "method": "lora",
            "batch": 1,
            "rank": 7,
            "remat": "products",
            "quantize": "none",
            "rows": "full",
        }
        trained = worker.run(Row("", "train", {**step, "seq": 16}), 300.0)["report"]
        assert trained["tok_s"] > 0 < trained["matmul_share"]
        with pytest.raises(device.Late):
            worker.run(Row("", "ceilings"), 0.0)
    finally:
        worker.close()
