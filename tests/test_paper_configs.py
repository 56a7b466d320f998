"""Every row of the paper's tables is a run: ``configs/paper.py``."""

import sys

import pytest

import train
from milora_jax.adapters.registry import METHODS, adapter_shape, build_method
from milora_jax.base.known import SHAPES
from milora_jax.data.records import read_records
from milora_jax.data.sources import parse_sources
from milora_jax.errors import UserError
from tests.paths import ROOT

pytest.importorskip("ml_collections", reason="train.py reads its configs with it")

TABLE_1 = {
    "parallel_adapter": (83.9, 83_886_080),
    "learned_adapter": (81.8, 83_886_848),
    "p_tuning_v2": (84.5, 84_541_440),
    "iapt": (83.9, 83_927_424),
    "bitfit": (87.0, 87_046_144),
    "ia3": (78.6, 78_655_488),
    "ssp": (80.6, 79_953_920),
    "lora": (80.0, 79_953_920),
    "adalora": (80.0, 79_961_088),
    "moelora": (87.3, 89_063_424),
    "dora": (80.0, 81_313_792),
    "milora": (80.9, 81_002_880),
    "midora": (80.9, 82_362_752),
}
"""Tunable parameters on LLaMA-2 7B: the paper's, in millions, and ours (docs/method.md: why they differ)."""

BATCHES = {
    "boolq": 16,
    "openbookqa": 16,
    "ARC-Easy": 16,
    "ARC-Challenge": 16,
    "gsm8k": 16,
    "piqa": 128,
    "AQuA": 128,
    "mixed": 128,
    "alpaca": 128,
}
"""16 where the training set has fewer than 10,000 rows (section 4.3)."""


@pytest.fixture
def parse(monkeypatch):
    """The flags of ``train.py --config configs/paper.py:WORDS``."""

    def run(words, *more):
        argv = ["train.py", "--config", f"{ROOT / 'configs/paper.py'}:{words}", *more]
        monkeypatch.setattr(sys, "argv", argv)
        return train.parse_arguments()

    return run


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_the_papers_tunable_parameters(parse, method):
    reported, counted = TABLE_1[method]
    config = parse(f"{method},boolq").config
    count = build_method(config.adapter).tunable_parameters(adapter_shape(SHAPES["llama2-7b"]))
    assert (config.adapter.method, count) == (method, counted)
    assert abs(count / (reported * 1e6) - 1) < 0.03


@pytest.mark.parametrize("task", BATCHES)
def test_each_task_has_the_papers_settings(parse, task):
    config = parse(f"milora,{task}").config
    train, data = config.train, config.data
    assert (train.batch_size, train.learning_rate, train.warmup_share) == (BATCHES[task], 1e-4, 0.06)
    assert (train.epochs, train.eval_every, train.patience, data.max_length) == (10, 200, 10, 768)
    assert (train.coefficient_learning_rate, train.coefficient_every) == (1e-6, 1)
    names = [source.name for source in parse_sources(data.train)]
    assert len(names) == (5 if task == "mixed" else 1)
    assert [source.name for source in parse_sources(data.test)] == ([] if task == "alpaca" else names)
    method = build_method(config.adapter)
    assert (method.rank, method.top_k, method.pooler, method.load_balance) == (32, 3, "attention", 1e-2)


@pytest.mark.parametrize(
    ("row", "changed"),
    [
        ("milora-1", ("mean", "rational")),
        ("milora-2", ("last", "rational")),
        ("milora-3", ("attention", "gelu")),
        ("milora-4", ("attention", "relu-gelu")),
        ("milora-5", ("attention", "gelu-relu")),
    ],
)
def test_the_ablations_of_table_5(parse, row, changed):
    method = build_method(parse(f"{row},piqa").config.adapter)
    assert (method.name, method.pooler, method.activation) == ("milora", *changed)


@pytest.mark.parametrize("base", ["llama2-7b", "llama2-13b", "gemma-2b"])
@pytest.mark.parametrize("method", ["milora", "moelora"])
def test_the_bases_of_table_7(parse, base, method):
    config = parse(f"{method},boolq,{base}").config
    assert build_method(config.adapter).tunable_parameters(adapter_shape(SHAPES[base])) > 0
    # Gemma 2B lies whole on every device; the others are split over all of them.
    assert (config.mesh.fsdp == -1) == base.startswith("llama")


def test_every_row_has_a_workdir_of_its_own_and_takes_overrides(parse):
    config, workdir, _ = parse("milora,ARC-Easy", "--config.adapter.top_k=1")
    assert (config.adapter.top_k, workdir.as_posix()) == (1, "runs/paper-milora-ARC-Easy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lroa,boolq", "did you mean 'lora'"),
        ("milora,bool", "did you mean 'boolq'"),
        ("milora,boolq,llama2-70b", "did you mean 'llama2-7b'"),
        ("milora", "expected METHOD,TASK"),
        ("", "expected METHOD,TASK"),
    ],
)
def test_a_row_that_there_is_not_is_refused(parse, words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


def test_words_for_a_config_that_takes_none_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={ROOT / 'configs/tiny.py'}:boolq"])
    with pytest.raises(UserError) as caught:
        train.parse_arguments()
    assert "configs/tiny.py: TypeError: get_config() takes 0" in str(caught.value)


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["boolq", "openbookqa", "ARC-Easy", "ARC-Challenge"])
def test_the_files_have_the_papers_rows(parse, shared_data, task):
    """The real files of LLM-Adapters, under the names that the config expects."""
    paper = {"boolq": (9427, 3270), "openbookqa": (4957, 500), "ARC-Easy": (2251, 2376)}
    rows = {**paper, "ARC-Challenge": (1119, 1172)}
    config = parse(f"milora,{task}").config
    found = []
    for text in (config.data.train, config.data.test):
        source = parse_sources(text.replace("data/", f"{shared_data / 'llm_adapters'}/"))[0]
        found.append(len(read_records(source, scored=True)))
    assert tuple(found) == rows[task]
