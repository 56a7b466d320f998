"""What the docs give to supervisors restarts a run as they say."""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milora_jax.errors import EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_NOTHING_LEARNED
from tests.paths import ROOT, environment
from tests.training.runs import command

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
UNIT, PROGRAM = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)
FINAL = [EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_NOTHING_LEARNED]
SECONDS = 300


def test_the_pages_name_the_exit_codes_that_are_final():
    unit, program = configparser.ConfigParser(), configparser.ConfigParser()
    unit.optionxform = str
    unit.read_string(UNIT)
    program.read_string(PROGRAM)
    final = " ".join(map(str, FINAL))
    assert unit["Service"]["RestartPreventExitStatus"] == final
    assert program["program:math"]["exitcodes"] == f"0,{final.replace(' ', ',')}"
    assert f"values: [{final.replace(' ', ', ')}]" in PAGE


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "math.service"
    unit.write_text(UNIT.replace("/srv/milora_jax/.venv/bin/python", sys.executable))
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert str(unit) not in found.stderr, "a line that systemd ignores"


def supervised(tmp_path, words):
    """Start supervisord with the program of the docs; its log."""
    program = re.sub(r"^command=.*", f"command={shlex.join(map(str, words))}", PROGRAM, flags=re.MULTILINE)
    program = program.replace("/srv/milora_jax", str(ROOT))
    log = tmp_path / "supervisord.log"
    settings = f"[supervisord]\nnodaemon=true\nlogfile={log}\npidfile={tmp_path / 'pid'}\n"
    output = f"redirect_stderr=true\nstdout_logfile={tmp_path / 'said'}\n"
    (tmp_path / "conf").write_text(settings + program + output)
    where = shutil.which("supervisord") or str(Path(sys.executable).with_name("supervisord"))
    process = subprocess.Popen(
        [where, "-c", tmp_path / "conf"], env=environment(1), cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    waited(log.is_file, process)
    return process, log


def waited(holds, process):
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)


@pytest.fixture
def supervisor():
    pytest.importorskip("supervisor", reason="pip install supervisor")


@pytest.mark.slow
def test_a_killed_run_is_restarted_until_it_has_ended(supervisor, inputs, tmp_path):
    workdir = tmp_path / "run"
    process, log = supervised(tmp_path, command(inputs, workdir, **{"train.save_every": 2}))
    try:
        waited(lambda: (workdir / "checkpoints" / "2").is_dir(), process)
        os.kill(int(re.findall(r"spawned: 'math' with pid (\d+)", log.read_text())[-1]), signal.SIGKILL)
        waited(lambda: "exited: math (exit status 0; expected)" in log.read_text(), process)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
    assert log.read_text().count("spawned: 'math'") == 2
    assert "resuming at step" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(supervisor, inputs, tmp_path):
    process, log = supervised(tmp_path, command(inputs, tmp_path / "run", **{"train.batch_size": 0}))
    try:
        waited(lambda: "exited: math (exit status 2; expected)" in log.read_text(), process)
        time.sleep(3)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
    assert log.read_text().count("spawned: 'math'") == 1
