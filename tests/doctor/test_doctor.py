"""The doctor as a person calls it: a healthy run is all ok, an ill one is told, nothing is a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milora_jax.commands import index as commands
from milora_jax.doctor import checks
from milora_jax.doctor.checks import Check, look_at
from milora_jax.doctor.findings import FAIL, OK, WARN, Finding
from milora_jax.doctor.subject import Subject
from milora_jax.errors import UserError
from tests.doctor.runs import bad, config_of, flags_of, run_command_line, write_inputs, write_workdir

pytest.importorskip("transformers", reason="the doctor looks at tokenizers")
pytest.importorskip("ml_collections", reason="config files need it")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def workdir(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_workdir(folder, config_of(inputs))
    return folder


@pytest.mark.thorough
def test_a_healthy_run_is_all_ok(inputs, workdir, monkeypatch, capsys):
    """Routing included: real rows, the stored adapter, the programs of training and of decoding."""
    run_command_line(monkeypatch, "--workdir", workdir, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert [f for f in report["findings"] if f["level"] != OK] == []
    found = {f["check"] for f in report["findings"]}
    assert {"versions", "devices", "base", "mesh", "memory", "tokenizer", "template", "routing"} <= found
    assert {"data.train", "data.dev", "data.test", "overlap", "checkpoints", "best"} <= found
    routing = [f["text"] for f in report["findings"] if f["check"] == "routing"]
    assert routing[0].startswith("8 rows, the adapter of step 7: training and prefill differ by")
    assert "decoding carries the route of 2 layers unchanged" in routing[1]


def test_one_that_is_ill_is_told_in_lines_and_by_the_exit_code(inputs, tmp_path, monkeypatch, capsys):
    """A data set whose last line is cut; the checks that do not depend on it go on."""
    text = (inputs / "train.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(text[:-20])
    flags = [*flags_of(config_of(inputs)), f"--config.data.train={tmp_path / 'cut.jsonl'}"]
    with pytest.raises(UserError, match=r"1 of \d+ findings are failures"):
        run_command_line(monkeypatch, "--config", ROOT / "configs/tiny.py", *flags)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fail") and "cut.jsonl:16: not JSON" in line for line in lines)
    assert any(line.startswith("ok    data.test   rows read:") for line in lines)
    assert "warn  tokens      not looked at: rows failed" in lines
    assert "warn  routing     not looked at: tokens failed" in lines


def test_a_workdir_that_a_run_will_make_is_no_failure(inputs, tmp_path, monkeypatch, capsys):
    """The look before a run; rows under a task's name whose answers are not that task's are told as well."""
    rows = str(inputs / "test.jsonl")
    flags = [*flags_of(config_of(inputs)), f"--config.data.test=boolq={rows}"]
    given = ("--config", ROOT / "configs/tiny.py", "--workdir", tmp_path / "new", *flags)
    with pytest.raises(UserError, match=r"1 of \d+ findings are failures"):
        run_command_line(monkeypatch, *given)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok    workdir") and "is new: train.py begins there" in line for line in lines)
    (failure,) = [line for line in lines if line.startswith("fail")]
    assert "answers is one of task 'boolq'" in failure
    assert not (tmp_path / "new").exists()


def test_without_arguments_it_looks_at_the_machine(monkeypatch, capsys):
    run_command_line(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", "versions"], ["ok", "devices"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/no.py"], "no such file"),
        (["--config", "configs/tiny.py", "--config.train.batchsize=2"], "batch_size"),
        (["--workdir", "{folder}"], "is no workdir: it holds no config.json"),
    ],
)
def test_settings_that_cannot_be_read_fail_and_the_machine_is_looked_at(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError):
        run_command_line(monkeypatch, *(a.format(folder=tmp_path) for a in arguments))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fail")
    assert message in lines[0]
    assert lines[-1].startswith("ok    devices")


def test_what_is_no_command_line_is_refused(monkeypatch):
    with pytest.raises(UserError, match="changes a --config, and none is given"):
        run_command_line(monkeypatch, "--nothing")
    monkeypatch.setattr(sys, "argv", ["milora_jax", "docter"])
    with pytest.raises(UserError, match="did you mean 'doctor'"):
        commands.main()


def test_a_check_that_raises_has_failed_in_one_line_and_the_others_go_on(monkeypatch):
    def breaks(subject):
        yield Finding(OK, "first", "fine so far")
        raise RuntimeError("XLA says\nmany things")

    def looks(subject):
        yield Finding(OK, "second", "fine")

    made = (Check("first", breaks), Check("second", looks), Check("third", looks, ("first",)))
    monkeypatch.setattr(checks, "CHECKS", made)
    found = [f for f in look_at(Subject(None, None, None), True) if f.check != "devices"]
    assert [(f.level, f.check) for f in found] == [
        (OK, "first"),
        (FAIL, "first"),
        (OK, "second"),
        (WARN, "third"),
    ]
    assert bad(found)[0] == "fail  first       RuntimeError: XLA says many things"


def test_a_broken_installation_is_a_line_and_no_traceback(tmp_path):
    """Flax that cannot be imported, as with a JAX that it does not know."""
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax/__init__.py").write_text("raise ImportError('cannot import name of jax')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "milora_jax", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert "fail  import      ImportError: cannot import name of jax" in done.stdout
    assert done.stderr.splitlines() == ["error: 1 of 2 findings are failures"]


def test_the_list_of_commands_holds_every_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["milora_jax"])
    commands.main()
    said = capsys.readouterr().out
    rooms = {path.parent.name for path in (ROOT / "milora_jax").glob("*/__main__.py")}
    assert rooms == {name for name in rooms if f"python -m milora_jax.{name}" in said}
    assert said.count("python -m milora_jax.") == len(rooms)
