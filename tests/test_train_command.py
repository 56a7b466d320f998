"""The command line of train.py: what it refuses, in one line, before anything is written."""

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import train
from milora_jax.adapters.registry import build_method
from milora_jax.commands.command_line import run_command
from milora_jax.commands.config_options import read_config_file
from milora_jax.config import AdapterSection, Config, DataSection, TrainSection
from milora_jax.data.records import Record
from milora_jax.errors import UserError
from milora_jax.evaluation.study.reports import COMPARISONS
from milora_jax.evaluation.study.settings import LETTER, load_study
from milora_jax.training.loop import planned_steps
from milora_jax.training.workdir import MetricsLog
from tests.models import write_hf_directory

ROOT = Path(__file__).resolve().parents[1]
ROW = {"instruction": "Say two.", "input": "", "output": "two", "answer": "two"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_hf_directory(folder / "model")
    (folder / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 12)
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(json.dumps(ROW) + '\n{"instruction": "x"}\n')
    return folder


@pytest.fixture
def parse(monkeypatch):
    """train.parse_arguments as if train.py had been started with the given arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return train.parse_arguments()

    return run


def arguments(inputs, workdir, *more):
    given = (
        f"--config.model.path={inputs / 'model'}",
        f"--config.data.train={inputs / 'rows.jsonl'}",
        "--config.data.dev=",
        "--config.data.test=",
        "--config.data.max_length=512",
        "--config.train.batch_size=8",
    )
    return ["train.py", "--config", str(ROOT / "configs/tiny.py"), f"--workdir={workdir}", *given, *more]


REFUSED = {
    "top-k above seven": ("--config.adapter.top_k=8", "adapter.top_k is 8: expected 1 to 7"),
    "no top-k": ("--config.adapter.top_k=0", "adapter.top_k is 0"),
    "unknown field": (
        "--config.adapter.rnak=8",
        """no setting is called 'rnak' (Did you mean "rank" instead of "rnak"?)""",
    ),
    "unknown group": ("--config.adaptor.rank=8", "no setting is called 'adaptor' (Did you mean"),
    "nothing like any": ("--config.zzz=1", "no setting is called 'zzz'"),
    "ill-typed number": ("--config.adapter.rank=many", "adapter.rank=many: expected a whole number"),
    "ill-typed rate": ("--config.train.learning_rate=x", "train.learning_rate=x: expected a number"),
    "ill-typed flag": ("--config.adapter.normalize=maybe", "adapter.normalize=maybe: expected true or false"),
    "fraction for a whole number": (
        "--config.train.max_steps=2.5",
        "train.max_steps=2.5: expected a whole number",
    ),
    "unknown method": ("--config.adapter.method=milora2", "did you mean 'milora'?"),
    "unknown pooler": ("--config.adapter.pooler=atention", "did you mean 'attention'?"),
    "unknown dtype": ("--config.model.dtype=int8", "model.dtype is 'int8'"),
    "unknown quantisation": ("--config.model.quantize=int4", "model.quantize is 'int4'"),
    "too narrow for its blocks": ("--config.model.quantize=nf4", "is 32: expected a multiple of 64 for NF4"),
    "unknown tracker": ("--config.train.trackers=tensorbord", "did you mean 'tensorboard'?"),
    "infinite rate": ("--config.train.learning_rate=inf", "train.learning_rate is inf"),
    "negative rate": ("--config.train.learning_rate=-1.0", "train.learning_rate is -1.0"),
    "unknown flag": ("--wrokdir=x", "wrokdir"),
    "stray word": ("stray", "unexpected argument 'stray'"),
    "no model": ("--config.model.path=nowhere", "no such directory"),
    "empty model": ("--config.model.path=", "model.path is ''"),
    "no train file": ("--config.data.train=nowhere.jsonl", "nowhere.jsonl: no such file"),
    "no train": ("--config.data.train=", "data.train is ''"),
    "empty data": ("--config.data.train={inputs}/empty.jsonl", "the data set is empty"),
    "broken data": (
        "--config.data.train={inputs}/broken.jsonl",
        "broken.jsonl:2: field 'output'",
    ),
    "broken test data": ("--config.data.test={inputs}/broken.jsonl", "broken.jsonl:2: field 'output'"),
    "answers of another task": (
        "--config.data.test=boolq={inputs}/rows.jsonl",
        "answers is one of task 'boolq'",
    ),
    "rows too long": ("--config.data.max_length=16", "longer than data.max_length 16 tokens"),
    "longer than the model": ("--config.data.max_length=513", "at most the model's 512 positions"),
    "mesh": ("--config.mesh.tensor=3", "does not fit 8 device"),
    "seed": ("--config.train.seed=9223372036854775808", "train.seed"),
    "two configs": ("--config=configs/tiny.py", "--config is given 2 times"),
    "prompt too long to answer": (
        "--config.eval.max_new_tokens=450 --config.data.test={inputs}/rows.jsonl",
        "prompt length of row 1 of 'rows', which is scored",
    ),
    "batch": ("--config.train.batch_size=9", "train.batch_size is 9: expected a multiple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(case, inputs, tmp_path, monkeypatch):
    flag, message = REFUSED[case]
    monkeypatch.setattr(sys, "argv", arguments(inputs, tmp_path / "w", *flag.format(inputs=inputs).split()))
    with pytest.raises(UserError) as caught:
        train.main()
    assert message in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_help_lists_every_setting_with_its_default(parse, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert not ended.value.code
    told = capsys.readouterr().out
    for section, settings in Config().to_dict().items():
        for name in settings:
            assert re.search(rf"^  --config\.{section}\.{name}\s", told, re.MULTILINE), name
    assert max(map(len, told.partition("options:")[2].splitlines())) <= 100
    entry = " --config.eval.limit VALUE rows scored per task; 0 means all (default: 0) --"
    assert entry in " ".join(told.split())
    assert "``" not in told.partition("options:")[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing"),
        (["--config", "configs/no.py"], "no such file"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_a_config_is_needed(parse, argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import no_such_library", "No module named 'no_such_library'"),
        ("def get_config():\n    return {}", "get_config() gives a dict"),
    ],
)
def test_a_config_file_that_is_none_is_one_line(parse, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as caught:
        parse(f"--config={tmp_path / 'mine.py'}")
    assert message in str(caught.value)


def test_what_the_file_system_refuses_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: (tmp_path / "no" / "file").write_text("x"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no' / 'file'}: No such file or directory\n"


def test_a_workdir_that_is_a_file_is_one_line(inputs, tmp_path, monkeypatch):
    (tmp_path / "w").write_text("")
    monkeypatch.setattr(sys, "argv", arguments(inputs, tmp_path / "w"))
    with pytest.raises(UserError, match="cannot use workdir"):
        train.main()


def test_unreadable_lines_of_the_log_are_dropped_and_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\0\0\n{"step": 2}\n{"step": 3}\n{"st')
    told = []
    MetricsLog(tmp_path, 2, told.append).write(3, {"loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null}\n'
    assert len(told) == 1


def test_a_refused_run_ends_with_one_line_and_code_two(inputs, tmp_path, monkeypatch, refused):
    """As a process it does so in test_command_lines.py."""
    monkeypatch.setattr(sys, "argv", arguments(inputs, tmp_path / "w", "--config.adapter.top_k=9"))
    line = refused(lambda _: train.main())
    assert line == "error: adapter.top_k is 9: expected 1 to 7, a layer has 7 experts"
    assert not (tmp_path / "w").exists()


CONFIGS = [path.stem for path in sorted((ROOT / "configs").glob("*.py"))]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("study_")])
def test_every_study_file_is_a_page_one_can_run(name, request, monkeypatch):
    path = ROOT / f"configs/{name}.py"
    if "MILORA_DATA" in path.read_text():
        monkeypatch.setenv("MILORA_DATA", str(request.getfixturevalue("shared_data")))
    assert load_study(path).methods
    said = re.findall(rf"milora_jax.evaluation study (\w+) --config configs/{name}.py", path.read_text())
    assert said
    assert {"all", *COMPARISONS}.issuperset(said)


def test_the_letter_of_the_studies_is_the_papers():
    paper = runpy.run_path(str(ROOT / "configs/paper.py"))["SETTINGS"]["milora"]
    ours, theirs = (build_method(AdapterSection(**settings)) for settings in (LETTER, paper))
    # Nothing moves by the rate where there is no bias.
    assert dataclasses.replace(theirs, rank=ours.rank, bias_rate=ours.bias_rate) == ours


def test_a_study_without_its_rows_says_which_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MILORA_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"e2e_cleaned/train.jsonl': No such file .*; MILORA_DATA names"):
        load_study(ROOT / "configs/study_smollm2.py")


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("study_")])
def test_every_config_file_is_a_page_one_can_run(parse, name):
    config, workdir, _ = parse("--config", str(ROOT / f"configs/{name}.py"))
    assert workdir == Path("runs") / name
    text = (ROOT / f"configs/{name}.py").read_text()
    assert f"python train.py --config configs/{name}.py" in text.split('"""')[1]
    assert Config.from_dict(config.to_dict()) == config


def test_overrides_reach_the_config(parse):
    flags = ["--config.adapter.rank=5", "--config.train.learning_rate=1", "--config.adapter.normalize=false"]
    config, workdir, _ = parse("--config=configs/tiny.py", *flags, "--workdir", "here")
    assert (config.adapter.rank, config.train.learning_rate, config.adapter.features) == (5, 1.0, "raw")
    assert workdir == Path("here")


@pytest.mark.parametrize(
    "flags",
    [
        ["--config.train.seed=7", "--config.data.pack=true"],
        ["--config.train.seed", "7", "--config.data.pack"],
        ["--config.train.seed=x", "--config.data.pack=T", "--config.train.seed=7"],
        ["-config.train.seed=7", "-config.data.pack=1"],
        ["--config.train.seed=0x7", "--noconfig.data.pack", "--config.data.pack"],
    ],
)
def test_a_setting_may_be_spelt_in_many_ways(parse, flags, capsys):
    config, *_ = parse("--config=configs/tiny.py", *flags)
    assert (config.train.seed, config.data.pack) == (7, True)
    old = [flag for flag in flags if flag.startswith(("-config", "--noconfig"))]
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(" is deprecated")[0] for note in notes] == [f"note: {flag}" for flag in old]
    assert all(note.endswith(("--config.train.seed=7", "--config.data.pack=1", "=false")) for note in notes)


@pytest.mark.parametrize("flag", ["--flagfile=options.txt", "-flagfile", "--undefok=zzz"])
def test_an_option_of_absl_is_refused_by_name(parse, flag):
    with pytest.raises(UserError) as caught:
        parse(flag, "--config.train.seed=7")
    line = str(caught.value)
    assert line.startswith(f"command line: {flag.partition('=')[0]} is an option of absl that is gone: ")
    assert "\n" not in line
    with pytest.raises(UserError, match="is an option of absl that is gone"):
        read_config_file("configs/tiny.py", [flag])


def test_an_option_with_one_dash_is_read_with_a_note(parse, capsys):
    *_, workdir, _ = parse("-config", "configs/tiny.py", "-workdir", "here")
    assert workdir == Path("here")
    assert capsys.readouterr().err.splitlines() == [
        "note: -config is deprecated, from the next release on write --config",
        "note: -workdir is deprecated, from the next release on write --workdir",
    ]


def test_the_paper_settings_and_the_router_we_recommend(parse):
    math, *_ = parse("--config", "configs/llama7b_math.py")
    method = build_method(math.adapter)
    assert (method.name, method.top_k, method.pooler, method.rank) == ("milora", 3, "attention", 32)
    assert (math.train.learning_rate, math.train.warmup_share) == (1e-4, 0.06)
    assert math.train.coefficient_learning_rate == 1e-6
    assert (method.features, method.router_gradient) == ("standardized", "dense")
    assert (method.top_k_anneal, method.load_balance) == (0.4, 0.0)


def test_unknown_names_in_a_mapping_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown setting config.adapter.topk \(did you mean 'top_k'\?\)"):
        Config.from_dict({"adapter": {"topk": 3}})
    with pytest.raises(UserError, match=r"config.adapter.rank is '8': expected a value of type int"):
        Config.from_dict({"adapter": {"rank": "8"}})
    with pytest.raises(UserError, match="mesh"):
        Config.from_dict({"mesh": {"data": -1, "fsdp": -1}})
    for bad in ({"dropout": 1.0}, {"rank": 0}, {"alpha": float("nan")}, {"load_balance": -1.0}):
        with pytest.raises(UserError):
            build_method(AdapterSection(**bad))
    with pytest.raises(UserError):
        DataSection(max_length=2)
    assert Record("a", "", "b", "c") == Record("a", "", "b", "c")


def test_planned_steps():
    assert planned_steps(TrainSection(epochs=2, batch_size=10), 95) == 19
    assert planned_steps(TrainSection(epochs=2, batch_size=10, max_steps=7), 95) == 7
    assert planned_steps(TrainSection(epochs=1, batch_size=10), 3) == 1
