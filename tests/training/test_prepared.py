"""Rows in files are the rows in memory, to the bit; and nothing half-made, stale or damaged is ever read."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from milora_jax.config import Config
from milora_jax.data import rows as rows_module
from milora_jax.data.batches import batch_rows
from milora_jax.data.stored import ExampleWriter
from milora_jax.data.tokens import token_fingerprint
from milora_jax.errors import EXIT_BAD_INPUT, UserError
from milora_jax.storage.files import UNFINISHED
from milora_jax.storage.manifest import MANIFEST
from milora_jax.training import prepare, prepared
from milora_jax.training.prepare import prepare_run, with_rows
from milora_jax.training.workdir import differences
from tests.data.chats import CHATML, SPECIAL, write_chat_tokenizer
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.paths import ROOT, environment
from tests.training.runs import assert_same_end, command, life, steps_of

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")

LENGTH, ENDS = 400, (2, SPECIAL.index("<|im_end|>"))
PLAIN = [
    {
        "instruction": f"say {i}",
        "input": "",
        "output": "long " * 200 if i % 7 == 3 else f"{i} {'x' * (i % 5)}",
    }
    for i in range(40)
]
CHATS = [
    {
        "messages": [
            {"role": role, "content": f"{role} {i} {turn}"}
            for turn in range(1 + i % 3)
            for role in ("user", "assistant")
        ]
    }
    for i in range(20)
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of files, and a run on a small base, whose rows are replaced."""
    folder = tmp_path_factory.mktemp("rows")
    write_hf_directory(folder / "model", dataclasses.replace(WITH_TOKENIZER, num_layers=1, eos_ids=ENDS))
    write_chat_tokenizer(folder / "model", CHATML)
    write_rows(folder / "train.jsonl", PLAIN)
    write_rows(folder / "dev.jsonl", PLAIN[3:20])
    write_rows(folder / "chats.jsonl", CHATS)
    return folder, prepare_run(config_of(folder), None, lambda line: None)


def config_of(folder, prepared_path="", train="train.jsonl", **more):
    data = {name: value for name, value in more.items() if name not in ("seed", "route_on")}
    data |= {"dev": str(folder / data["dev"])} if "dev" in data else {}
    return Config.from_dict(
        {
            "model": {"path": str(folder / "model")},
            "data": {
                "train": str(folder / train),
                "max_length": LENGTH,
                "prepared_path": str(prepared_path),
                **data,
            },
            "train": {"seed": more.get("seed", 0), "batch_size": 8},
            "adapter": {"route_on": more["route_on"]} if "route_on" in more else {},
        }
    )


def read(made, prepared_path, run=None, **more):
    """The run with its rows in files, and what was logged."""
    said = []
    return with_rows(run or made[1], config_of(made[0], prepared_path, **more), said.append), said


def directories(folder):
    return sorted(path.name for path in folder.iterdir())


CASES = {
    "held-out": {},
    "packed": {"pack": True},
    "limited": {"dev_limit": 2, "dev_share": 0.5, "seed": 5},
    "dev-file": {"dev": "dev.jsonl", "dev_limit": 4, "pack": True},
    "chats": {"train": "chats.jsonl", "template": "chat"},
    "first-turn": {"train": "chats.jsonl", "template": "chat", "route_on": "first_turn", "pack": True},
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_they_are_the_rows_in_memory(made, tmp_path, case):
    """Batches, fingerprints and log lines; when the files are made, and when they are opened."""
    settings = CASES[case]
    memory, told = read(made, "", **settings)
    for start in ("made", "opened"):
        files, said = read(made, tmp_path / "prepared", **settings)
        assert any("is made once" in line for line in said) == (start == "made")
        assert [line for line in said if "is made once" not in line] == told
        for name in ("data_fingerprint", "token_fingerprint", "row_length", "prompts"):
            assert getattr(files, name) == getattr(memory, name), name
        for name in ("train", "dev"):
            ours, theirs = getattr(files, name), getattr(memory, name)
            assert (len(ours), len(ours.examples)) == (len(theirs), len(theirs.examples))
            np.testing.assert_array_equal(ours.lengths, theirs.lengths)
            for mine, other in zip(ours.examples, theirs.examples, strict=True):
                assert dataclasses.replace(mine, tokens=0) == dataclasses.replace(other, tokens=0)
        assert token_fingerprint([*files.train.examples, *files.dev.examples]) == memory.token_fingerprint
        for step in range(4):
            numbers = batch_rows(0, step, len(memory.train), 8)
            jax.tree.map(
                np.testing.assert_array_equal,
                files.batch(files.train, numbers),
                memory.batch(memory.train, numbers),
            )


def test_a_host_reads_the_rows_of_its_devices_only(made, tmp_path, monkeypatch):
    run, _ = read(made, tmp_path)
    whole = run.batch(run.train, range(8))
    monkeypatch.setattr(prepare, "own_rows", lambda sharding, count: frozenset({2, 3}))
    part = run.batch(run.train, range(8))
    for name in ("tokens", "segment_ids", "loss_mask"):
        own, every = np.asarray(getattr(part, name)), np.asarray(getattr(whole, name))
        np.testing.assert_array_equal(own[2:4], every[2:4])
        assert not own[[0, 1, 4, 5, 6, 7]].any()


@pytest.mark.thorough
def test_what_the_tokens_depend_on_decides_the_directory(made, tmp_path):
    folder = tmp_path / "inputs"
    shutil.copytree(made[0], folder)
    (folder / "inputs").mkdir()
    shutil.copy(folder / "train.jsonl", folder / "inputs")
    run = prepare_run(config_of(folder), None, lambda line: None)
    other = (folder, run)
    found = tmp_path / "prepared"

    def after(run=run, **more):
        read(other, found, run, **more)
        return len(directories(found))

    assert after() == after() == after(train="inputs/train.jsonl") == 1, "the path is nothing to it"
    assert after(seed=1) == 2, "other rows are held out"
    assert after(dev="dev.jsonl") == after(dev="dev.jsonl", seed=1) == 3
    assert after(max_length=LENGTH - 100) == 4
    assert after(special_tokens="bos") == 5
    assert after(train="chats.jsonl", template="chat") == 6
    assert after(train="chats.jsonl", template="chat", route_on="first_turn") == 7
    assert after(train="chats.jsonl", template="chat", template_time="2024-01-01") == 8
    write_rows(folder / "train.jsonl", PLAIN[1:])
    assert after() == 9
    write_chat_tokenizer(folder / "model", CHATML.replace("im_end", "im_stop"))
    changed = prepare_run(config_of(folder), None, lambda line: None)
    assert after(changed, train="chats.jsonl", template="chat") == 10


class HubRows(list):
    """What is used of a ``datasets.Dataset``."""

    _fingerprint = ""


def test_a_data_set_of_the_hub_has_its_own_fingerprint(made, tmp_path, monkeypatch):
    for number, count in enumerate((12, 12, 13)):
        each = HubRows(PLAIN[:count])
        each._fingerprint = f"revision {number // 2}"
        monkeypatch.setattr(rows_module, "hub_rows", lambda name, config, split, each=each: each)
        config = config_of(made[0], tmp_path)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train="hf:some/rows"))
        run = with_rows(made[1], config, lambda line: None)
        assert len(run.train) + len(run.dev) == (10, 10, 11)[number]
        assert len(directories(tmp_path)) == (1, 1, 2)[number]


class TestDamage:
    """What is not as it was written is made again, or refused by name."""

    @pytest.fixture
    def path(self, made, tmp_path):
        read(made, tmp_path)
        return tmp_path / directories(tmp_path)[0]

    def flip(self, path, at):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    @pytest.mark.parametrize("name", ["train.index", "train.answers", "dev.index", "about.json", MANIFEST])
    def test_of_a_small_file(self, made, tmp_path, path, name):
        (path / name).write_bytes(b"{}\n" if (path / name).read_bytes() == b"" else b"")
        run, said = read(made, tmp_path)
        assert sum("the rows are prepared again" in line for line in said) == 1
        assert run.token_fingerprint == made[1].token_fingerprint
        assert "again" not in "".join(read(made, tmp_path)[1])

    def test_of_the_tokens(self, made, tmp_path, path):
        (path / "train.tokens").write_bytes((path / "train.tokens").read_bytes()[:-4])
        assert any("the rows are prepared again" in line for line in read(made, tmp_path)[1])
        run, _ = read(made, tmp_path)
        self.flip(path / "train.tokens", 0)  # after the start: beartype reads an element of what is returned
        assert len(run.train[1]) == 1
        with pytest.raises(UserError, match=r"train\.tokens is damaged: the tokens of example 0"):
            _ = run.train[0]
        os.truncate(path / "train.tokens", 8)
        with pytest.raises(UserError, match="the tokens of example 1"):
            _ = run.train[1]

    def test_what_a_killed_process_left_is_removed(self, made, tmp_path):
        read(made, tmp_path / "a")
        (key,) = directories(tmp_path / "a")
        left = tmp_path / "b" / f".{key}.x{UNFINISHED}"
        left.mkdir(parents=True)
        (left / "train.tokens").write_bytes(b"abcd")
        (tmp_path / "b" / f".{key}.lock").touch()
        run, _ = read(made, tmp_path / "b")
        assert run.token_fingerprint == made[1].token_fingerprint
        assert directories(tmp_path / "b") == [key]


class TestRefused:
    """One clear line, and nothing half-written."""

    def test_a_bad_row(self, made, tmp_path):
        train = tmp_path / "bad.jsonl"
        write_rows(train, [*PLAIN[:5], {"instruction": "x"}])
        with pytest.raises(UserError, match=r"bad\.jsonl:6: field 'output'"):
            read(made, tmp_path / "prepared", train=train)
        assert not (tmp_path / "prepared").exists()
        with pytest.raises(UserError, match="no such file"):
            read(made, tmp_path / "prepared", train=tmp_path / "none.jsonl")

    def test_a_file_that_changes_meanwhile(self, made, tmp_path, monkeypatch):
        train = tmp_path / "changing.jsonl"
        write_rows(train, PLAIN)
        append = ExampleWriter.append

        def changing(writer, example):
            append(writer, example)
            if example.source != "changing":  # the training rows are all read
                write_rows(train, PLAIN[1:])

        monkeypatch.setattr(ExampleWriter, "append", changing)
        with pytest.raises(UserError, match="changed while they were read"):
            read(made, tmp_path / "prepared", train=train, dev="dev.jsonl")
        assert not (tmp_path / "prepared").exists()

    def test_a_full_disk(self, made, tmp_path, monkeypatch):
        def full(writer, example):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(ExampleWriter, "append", full)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            read(made, tmp_path / "prepared")
        assert not (tmp_path / "prepared").exists()

    def test_a_place_that_cannot_be_written(self, made, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"cannot write .*: File exists"):
            read(made, tmp_path / "file")
        with pytest.raises(UserError, match=r"data\.prepared_path is 'gs://bucket/x': expected a directory"):
            config_of(made[0], "gs://bucket/x")


def test_of_two_at_once_one_makes_them(made, tmp_path, monkeypatch):
    """``flock`` excludes two descriptors, of one process as of two."""
    append, said = ExampleWriter.append, []
    started = threading.Event()

    def slow(writer, example):
        started.set()
        time.sleep(0.005)
        append(writer, example)

    monkeypatch.setattr(ExampleWriter, "append", slow)
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(with_rows(made[1], config_of(made[0], tmp_path), said.append))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        started.wait(30)
    for thread in threads:
        thread.join(60)
    assert [sum(text in line for line in said) for text in ("is made once", "waiting for another")] == [1, 1]
    assert {run.token_fingerprint for run in found} == {made[1].token_fingerprint}
    assert len(found) == 2
    assert len(directories(tmp_path)) == 1


def test_without_locks_the_first_to_finish_is_read_by_all(made, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    seal = prepared.write_manifest

    def overtaken(partial):
        monkeypatch.setattr(prepared, "write_manifest", seal)
        read(made, tmp_path)  # another process finishes just before
        seal(partial)

    monkeypatch.setattr(prepared.fcntl, "flock", no_locks)
    monkeypatch.setattr(prepared, "write_manifest", overtaken)
    run, _ = read(made, tmp_path)
    assert run.token_fingerprint == made[1].token_fingerprint
    assert len(directories(tmp_path)) == 1


def test_a_run_may_be_resumed_with_or_without_it(made):
    before, after = config_of(made[0]), config_of(made[0], "somewhere")
    assert not [*differences(before, after), *differences(after, before)]


@pytest.mark.thorough
@pytest.mark.parametrize("packed", ["true", "false"])
def test_a_run_goes_on_with_files_to_the_same_end(inputs, tmp_path, packed):
    """The first life has its rows in memory and is killed in its sixth save; the others read files."""
    settings = {"data.pack": packed, "train.max_steps": 12}
    assert life(inputs, tmp_path / "memory", **settings).returncode == 0
    killed = life(inputs, tmp_path / "files", "before-rename:6", **settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    files = {**settings, "data.prepared_path": tmp_path / "prepared"}
    last = life(inputs, tmp_path / "files", **files)
    assert last.returncode == 0, last.stderr
    assert "resuming at step 5" in last.stderr
    assert steps_of(tmp_path / "files")[-1] == 12
    assert_same_end(tmp_path / "files", tmp_path / "memory")


@pytest.mark.thorough
def test_kill_nine_while_they_are_made(inputs, tmp_path):
    """At any example, and before the seal and the rename: the next life makes them anew."""
    code = """
import os, runpy, signal, sys
from milora_jax.data.stored import ExampleWriter
from milora_jax.training import prepared
count, append = int(sys.argv.pop(1)), ExampleWriter.append
def dying(writer, example):
    append(writer, example)
    globals()["count"] -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
ExampleWriter.append = dying
seal = prepared.write_manifest
def sealed(partial):
    if count == -3: os.kill(os.getpid(), signal.SIGKILL)
    seal(partial)
    if count == -4: os.kill(os.getpid(), signal.SIGKILL)
prepared.write_manifest = sealed
runpy.run_path("train.py", run_name="__main__")
"""
    found = tmp_path / "prepared"
    settings = {"train.max_steps": 2, "data.prepared_path": found}
    for count in (1, 20, 39, 37, 36):  # 40 examples: -3 and -4 are left of the last two
        _, script, *arguments = command(inputs, tmp_path / "run", **settings)
        assert script == "train.py"
        dead = subprocess.run(
            [sys.executable, "-c", code, str(count), *arguments],
            cwd=ROOT,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert dead.returncode == -signal.SIGKILL, (count, dead.stderr)
        assert all(name.startswith(".") for name in directories(found)), "nothing of it is ever opened"
    alive = life(inputs, tmp_path / "run", **settings)
    assert alive.returncode == 0, alive.stderr
    assert len(directories(found)) == 1
    (tmp_path / "file").touch()
    refused = life(inputs, tmp_path / "other", **{**settings, "data.prepared_path": tmp_path / "file"})
    assert refused.returncode == EXIT_BAD_INPUT
    assert refused.stderr.count("\n") == 1
    assert "File exists" in refused.stderr
