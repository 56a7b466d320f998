"""Scoring on many devices and by many processes: row by row what one process on one device writes."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from milora_jax.commands.evaluation import main
from milora_jax.errors import EXIT_PREEMPTED, UserError
from milora_jax.evaluation.subject import named_subject, read_subject
from milora_jax.storage.files import read_json
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.paths import ROOT, environment
from tests.processes import ended, run_together, said_by, start_together
from tests.storage.adapters import run_of

EVALUATION = (sys.executable, "-m", "milora_jax.evaluation")
UNEVEN = dataclasses.replace(WITH_TOKENIZER, hidden_size=48, num_heads=6, num_kv_heads=3)
"""Two devices on the axis ``tensor`` share a head."""

ROWS = 19


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models with a run each, and rows of several lengths."""
    folder = tmp_path_factory.mktemp("together")
    for name, config in (("even", WITH_TOKENIZER), ("uneven", UNEVEN)):
        write_hf_directory(folder / name / "model", config)
        run_of(folder / name / "run", folder / name / "model", "milora")
    rows = [
        {"instruction": f"{'add ' * (i % 9)}{i}", "output": f"It is {i}", "answer": f"{i}"}
        for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(folder, model, *more):
    given = ("--workdir", folder / model / "run", "--data", folder / "rows.jsonl")
    return [*map(str, (*given, "--batch-size", 8, "--max-new-tokens", 6, *more))]


def assert_same_result(found, expected):
    """The same figures; a sum over devices may differ in its last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("loss", "perplexity"):
            np.testing.assert_allclose(list(found[name].values()), list(value.values()), rtol=1e-5)
        else:
            assert found[name] == value


@pytest.fixture(scope="module")
def alone(folder):
    """The predictions and the result of one process on one device, by model and number of beams."""
    found = {}

    def of(model, beams):
        if (model, beams) not in found:
            path = folder / f"{model}-{beams}.jsonl"
            main(options(folder, model, "--beams", beams, "--predictions", path))
            result = read_json(path.with_suffix(".result.json"))["result"]
            found[model, beams] = path.read_text(), result
        return found[model, beams]

    return of


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "beams", "mesh"),
    [("even", 1, "data=2,fsdp=2,tensor=2"), ("even", 3, "fsdp=8"), ("uneven", 1, "fsdp=4,tensor=2")],
)
def test_a_mesh_scores_as_one_device(folder, tmp_path, capsys, alone, model, beams, mesh):
    path = tmp_path / "rows.jsonl"
    predictions, result = alone(model, beams)
    capsys.readouterr()
    main(options(folder, model, "--beams", beams, "--mesh", mesh, "--predictions", path))
    assert path.read_text() == predictions
    assert_same_result(json.loads(capsys.readouterr().out), result)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("fsdp=3", "mesh data=1 fsdp=3 tensor=1 does not fit 8 device"),
        ("rows=8", "--mesh is 'rows=8'"),
        ("fsdp=8", "--batch-size is 12: expected a multiple of mesh data x fsdp = 8"),
    ],
)
def test_a_mesh_that_does_not_suit_is_one_line(folder, mesh, message):
    subject = read_subject(named_subject(folder / "even" / "run"))
    with pytest.raises(UserError, match=message):
        subject.mesh(mesh, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "model", "beams", "mesh"),
    [
        (2, "even", 1, "data=2,fsdp=2,tensor=2"),
        (4, "even", 3, "fsdp=8"),
        (2, "uneven", 1, "fsdp=4,tensor=2"),
        (4, "uneven", 1, "data=2,fsdp=4"),
    ],
)
def test_processes_score_as_one(folder, tmp_path, alone, processes, model, beams, mesh):
    path = tmp_path / "rows.jsonl"
    more = ("--beams", beams, "--mesh", mesh, "--predictions", path)
    command = [*EVALUATION, *options(folder, model, *more)]
    printed = run_together([command] * processes, tmp_path / "log", 8 // processes)
    predictions, result = alone(model, beams)
    assert path.read_text() == predictions
    assert_same_result(json.loads(printed), result)


@pytest.mark.slow
def test_processes_generate_as_one(folder, tmp_path):
    """Stop strings, beams, samples, penalties and log-probabilities, which decide what is decoded next."""
    script = (sys.executable, "-m", "tests.evaluation.generate_together", folder / "even" / "run")
    expected = subprocess.run(
        [*script, "-"], cwd=ROOT, env=environment(8), check=True, timeout=300, capture_output=True
    )
    printed = run_together([[*script, "fsdp=4,tensor=2"]] * 2, tmp_path / "log", 4, 600)
    for found, other in zip(json.loads(printed), json.loads(expected.stdout), strict=True):
        np.testing.assert_allclose(found.pop("logprobs"), other.pop("logprobs"), atol=1e-4)
        assert found == other


@pytest.mark.slow
def test_processes_route_as_one(folder, tmp_path):
    given = ("routing", "--workdir", folder / "even" / "run", "--data", folder / "rows.jsonl")
    main([*map(str, given), "--out", str(tmp_path / "one")])
    command = [*EVALUATION, *given, "--mesh", "fsdp=8", "--out", tmp_path / "two"]
    run_together([command] * 2, tmp_path / "log", 4)
    expected, found = (read_json(tmp_path / name / "routing.json") for name in ("one", "two"))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The statistics are rounded to four places.
        assert one == (other if isinstance(other, str) else pytest.approx(other, abs=1.5e-4))


@pytest.mark.slow
def test_a_host_with_other_rows_is_named_by_all(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text((folder / "rows.jsonl").read_text().replace("add", "sum"))
    commands = [
        [*EVALUATION, *options(folder, "even", "--mesh", "fsdp=8", "--predictions", tmp_path / "p.jsonl")]
        for _ in range(2)
    ]
    commands[1][commands[1].index("--data") + 1] = str(tmp_path / "rows.jsonl")
    codes, texts = ended(start_together(commands, tmp_path / "log", 4)), said_by(tmp_path / "log", 2)
    assert codes == [2, 2], texts
    for said in texts:
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "tasks.rows.records is " in line
        assert "in process 1: expected the same command, the same files" in line
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.slow
def test_sigterm_to_one_stops_all_and_the_same_command_goes_on(folder, tmp_path, alone):
    path = tmp_path / "rows.jsonl"
    command = [*EVALUATION, *options(folder, "even", "--mesh", "fsdp=8", "--predictions", path)]
    processes = start_together([command] * 2, tmp_path / "log", 4)
    deadline = time.monotonic() + 200
    while not (path.is_file() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].terminate()
    codes = ended(processes)
    assert codes in ([EXIT_PREEMPTED] * 2, [0, 0]), said_by(tmp_path / "log", 2)
    run_together([command] * 2, tmp_path / "log", 4)
    assert path.read_text() == alone("even", 1)[0]
