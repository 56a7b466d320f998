"""Command lines keep compiled programs in the user's cache folder, within a limit, and never fail over it."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from milora_jax.commands import program_cache
from tests.paths import ROOT, environment

SETTINGS = (*program_cache.OWN_SETTINGS, *program_cache.DEFAULTS)


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user with an empty cache folder and no settings of JAX's cache."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "so that it is restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    return tmp_path / "cache" / "milora_jax" / "programs"


def settings():
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def test_programs_are_kept_in_a_folder_of_the_users_own(user, capsys):
    program_cache.keep_programs()
    folder = user / program_cache.machine_name()
    assert settings() == {"JAX_COMPILATION_CACHE_DIR": str(folder), **program_cache.DEFAULTS}
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_COMPILATION_CACHE_DIR", "/elsewhere"),
        ("JAX_COMPILATION_CACHE_DIR", ""),
        ("JAX_ENABLE_COMPILATION_CACHE", "false"),
        ("JAX_COMPILATION_CACHE_MAX_SIZE", "1000"),
    ],
)
def test_a_users_own_setting_decides(user, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    program_cache.keep_programs()
    assert settings() == {name: value}
    assert not user.exists()


def test_a_users_threshold_is_kept(user, monkeypatch):
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.setenv(name, "2.5")
    program_cache.keep_programs()
    assert settings()[name] == "2.5"
    assert "JAX_COMPILATION_CACHE_DIR" in settings()


def test_the_folder_follows_the_specification_of_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    inside = Path("milora_jax/programs")
    assert program_cache.cache_folder({"XDG_CACHE_HOME": "/big"}) == "/big" / inside
    for given in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert program_cache.cache_folder(given) == tmp_path / ".cache" / inside


def test_machines_of_other_instructions_have_other_folders(tmp_path):
    core = "processor\t: {}\nmodel name\t: EPYC\ncpu MHz\t\t: {}\nflags\t\t: fpu {}\n\n"
    names = []
    for text in (
        core.format(0, 2445.406, "avx2") + core.format(1, 2400.0, "avx2"),
        core.format(0, 3111.0, "avx2"),
        core.format(0, 2445.406, "avx2 avx512f"),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        names.append(program_cache.machine_name(tmp_path / "cpuinfo"))
    assert names[0] == names[1] != names[2]
    assert program_cache.machine_name(tmp_path / "none")


@pytest.mark.parametrize("broken", ["a file", "open to all"])
def test_a_folder_that_cannot_be_used_costs_one_line(user, capsys, broken):
    folder = user / program_cache.machine_name()
    if broken == "a file":
        user.parent.mkdir(parents=True)
        user.write_text("")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    program_cache.keep_programs()
    assert settings() == {}
    said = capsys.readouterr().err
    assert said.startswith("warning: compiled programs are not kept: ")
    assert len(said.splitlines()) == 1


def write(path, size, used):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))


def test_what_was_not_used_for_longest_goes(tmp_path):
    write(tmp_path / "old-machine" / "a-cache", 40, 1000)
    write(tmp_path / "new" / "b-cache", 30, 3000)
    write(tmp_path / "new" / "c-cache", 30, 2000)
    os.utime(tmp_path / "new" / "c-cache", (4000, 2000))  # written before b, read after it
    for limit, left in ((100, {"a", "b", "c"}), (99, {"b", "c"}), (59, {"c"}), (0, set())):
        program_cache.trim(tmp_path, limit)
        assert {path.name[0] for path in tmp_path.rglob("*-cache")} == left


def test_a_folder_is_looked_at_once_an_hour(tmp_path, monkeypatch):
    now, looked = 1_000_000.0, []
    monkeypatch.setattr(program_cache, "trim", lambda root, limit: looked.append((root, limit)))
    for moment, count in ((now, 1), (now + 3599, 1), (now + 3600, 2), (now, 3)):  # a clock may be put back
        monkeypatch.setattr(program_cache, "time", SimpleNamespace(time=lambda moment=moment: moment))
        program_cache.trim_now_and_then(tmp_path)
        assert len(looked) == count
        os.utime(tmp_path / "looked-at", (now, now) if moment < now + 3600 else (moment, moment))
    assert set(looked) == {(tmp_path, program_cache.LIMIT)}


def test_another_process_may_trim_at_the_same_time(tmp_path, monkeypatch):
    for each in range(4):
        write(tmp_path / f"{each}-cache", 10, 1000 + each)
    lstat = Path.lstat

    def taken(path):
        status = lstat(path)
        if path.name == "0-cache":
            path.unlink()  # just before this one removes it
        if path.name == "1-cache":
            path.unlink()
            raise FileNotFoundError(path)
        return status

    monkeypatch.setattr(Path, "lstat", taken)
    program_cache.trim(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["3-cache"]


def test_jaxs_warnings_of_its_cache_are_one_line(user, capsys, monkeypatch):
    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: others.append(str(message)))
        program_cache.keep_programs()
        for name in ("jit_a", "jit_b"):
            kind = "Error writing persistent compilation cache entry"
            warnings.warn(f"{kind} for '{name}': OSError: No space left", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    said = capsys.readouterr().err
    assert said.startswith("warning: Error writing persistent compilation cache entry for 'jit_a': OSError")
    assert len(said.splitlines()) == 1
    assert others == ["another"]


TRAIN = """
import hashlib, json, sys
from milora_jax.commands.program_cache import keep_programs
keep_programs()
import jax
import numpy as np
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.load import load_base
from milora_jax.base.modules import frozen_kernels
from milora_jax.config import AdapterSection, TrainSection
from milora_jax.tiny import MODEL_DIR
from milora_jax.training.step import init_state, make_steps
from milora_jax.types import Batch

base, config = load_base(str(MODEL_DIR))
tokens = np.arange(24, dtype=np.int32).reshape(2, 12) + 5
positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
batch = Batch(tokens, np.ones_like(tokens), positions, positions < 8, positions >= 8)
settings = TrainSection(learning_rate=1e-2)
method = build_method(AdapterSection(rank=2))
adapter = init_adapter(method, jax.random.key(0), adapter_shape(config), frozen_kernels(base))
state, steps = init_state(adapter, jax.random.key(1), settings, 3), make_steps(config, settings, 3)
for _ in range(3):
    state, metrics = steps.train(state, base, batch)
leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.adapter.params)]
print(json.dumps({
    "adapter": hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest(),
    "loss": float(metrics.loss).hex(),
    "hits": sum(each.endswith("/cache_hits") for each in hits),
    "misses": sum(each.endswith("/cache_misses") for each in hits),
}))
"""


@pytest.mark.thorough
def test_training_is_the_same_to_the_bit_with_kept_programs(tmp_path):
    kept = {name: value for name, value in environment().items() if name not in SETTINGS}
    found = []
    for cache in ("off", "cold", "warm"):
        off = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if cache == "off" else {}
        result = subprocess.run(
            [sys.executable, "-c", TRAIN],
            cwd=ROOT,
            env={**kept, "XDG_CACHE_HOME": str(tmp_path), **off},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == "", "no warnings of JAX or XLA"
        found.append(json.loads(result.stdout))
    off, cold, warm = found
    assert cold["hits"] == 0 < cold["misses"]
    assert warm["misses"] == 0 < warm["hits"]
    assert (off["adapter"], off["loss"]) == (cold["adapter"], cold["loss"]) == (warm["adapter"], warm["loss"])
