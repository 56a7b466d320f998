"""The benchmark of training measures what it says, on a small model; no time is asserted."""

import dataclasses
import json
import statistics

import jax
import pytest

from milora_jax.bench import train
from milora_jax.bench.models import random_base
from milora_jax.commands.bench import main
from milora_jax.errors import UserError
from milora_jax.model_config import LLAMA2_7B
from tests.models import QUANTIZABLE, TINY, WITH_TOKENIZER, write_hf_directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, dataclasses.replace(WITH_TOKENIZER, num_layers=2), tokenizer=False)
    return folder


@pytest.mark.slow
def test_one_object_per_variant_with_its_figures(folder, capsys):
    common = ["--model", str(folder), "--batch", "2", "--rank", "4", "--repeats", "2"]
    main(["train", *common, "--method", "milora,bitfit", "--seq", "16", "--remat", "none,full"])
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["method"], f["rank"], f["remat"]) for f in figures] == [
        (method, rank, remat) for method, rank in (("milora", 4), ("bitfit", 0)) for remat in ("none", "full")
    ]
    parameters = dataclasses.replace(WITH_TOKENIZER, num_layers=2).matrix_parameters
    for each in figures:
        seconds = statistics.median(each["seconds"])
        assert each["tok_s"] == each["useful_tok_s"] == pytest.approx(2 * 16 / seconds)
        assert each["ms_per_step"] == pytest.approx(1e3 * seconds)
        assert each["model_flops_s"] == pytest.approx(4 * parameters * 32 / seconds)
        assert each["matmul_share"] == pytest.approx(each["model_flops_s"] / each["matmul_flops_s"])
        assert each["peak_memory_bytes"] > each["step_bytes"] > 0
        assert each["versions"]["jax"] == jax.__version__
    assert figures[1]["step_bytes"] < figures[0]["step_bytes"]


@pytest.mark.slow
def test_quantised_bases_are_measured_beside_the_plain_one(tmp_path, capsys):
    write_hf_directory(tmp_path, QUANTIZABLE, tokenizer=False)
    common = ["--model", str(tmp_path), "--batch", "1", "--seq", "8", "--repeats", "1"]
    main(["train", *common, "--method", "bitfit", "--quantize", "none,int8,nf4"])
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["quantize"] for f in figures] == ["none", "int8", "nf4"]
    sizes = [f["step_bytes"] for f in figures]
    assert sizes[0] > max(sizes[1:])


def test_packed_rows_hold_more_tokens_of_records():
    padded, packed = (train.records(rows, 3, 768, 97) for rows in ("padded", "packed"))
    assert [len(row) for row in padded] == [1, 1, 1]
    assert max(len(row) for row in packed) > 1
    tokens = [sum(len(example.tokens) for row in rows for example in row) for rows in (padded, packed)]
    assert tokens[1] > 1.5 * tokens[0]
    assert tokens[1] <= 3 * 768
    lengths = {(e.prompt_length, len(e.tokens) - e.prompt_length) for row in packed for e in row}
    assert lengths <= set(train.GSM8K_LENGTHS)


@pytest.mark.slow
def test_padded_and_packed_are_measured_side_by_side(folder, capsys):
    main(
        [
            "train",
            "--model",
            str(folder),
            "--batch",
            "1",
            "--rank",
            "4",
            "--repeats",
            "1",
            "--seq",
            "320",
            "--packed",
        ]
    )
    padded, packed = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (padded["rows"], packed["rows"]) == ("padded", "packed")
    for each in (padded, packed):
        assert each["useful_tok_s"] == pytest.approx(each["useful_share"] * each["tok_s"])


def test_a_row_of_two_answers_is_as_long_as_one_of_a_record():
    (full,), (chosen, rejected) = (train.records(rows, 1, 17, 97)[0] for rows in ("full", "pairs"))
    assert len(chosen.tokens) + len(rejected.tokens) == len(full.tokens) == 17
    assert chosen.prompt_length == rejected.prompt_length == 4
    assert (chosen.tokens[:4] == rejected.tokens[:4]).all()
    assert (chosen.label, rejected.label) == (True, False)


@pytest.mark.slow
def test_objectives_are_measured_side_by_side(folder, capsys):
    common = ["--model", str(folder), "--batch", "2", "--rank", "4", "--repeats", "1", "--seq", "16"]
    main(["train", *common, "--method", "milora,bitfit", "--objective", "sft,dpo"])
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["method"], f["objective"], f["rows"]) for f in figures] == [
        (method, *objective)
        for method in ("milora", "bitfit")
        for objective in (("sft", "full"), ("dpo", "pairs"))
    ]
    assert {f["useful_share"] for f in figures} == {1.0}


def test_the_parameters_a_token_is_multiplied_with():
    """All matrices of the leaves themselves, but the embedding, whose rows are looked up."""
    sizes = [
        leaf.size for leaf in jax.tree.leaves(random_base(TINY, "float32", decode=True)) if leaf.ndim == 2
    ]
    assert TINY.matrix_parameters == sum(sizes) - TINY.vocab_size * TINY.hidden_size
    assert LLAMA2_7B.matrix_parameters == 6_738_415_616 - 32000 * 4096 - 65 * 4096


def test_every_method_that_has_a_rank_takes_it():
    """And no other: a rank that is not used would be reported as measured."""
    asked = train.Variant("ssp", 1, 4, "none", "none", "full")
    assert train._without_what_has_no_effect(asked).rank == 4
    assert train._without_what_has_no_effect(dataclasses.replace(asked, method="ia3")).rank == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "hf"], "--method is 'hf'"),
        (["--remat", "some"], "--remat is 'some'"),
        (["--seq", "9999"], "expected at most 512"),
        (["--batch", "0"], "--batch is 0"),
        (["--seq", "40", "--packed"], "--seq 40: expected at least 145 with --packed"),
        (["--objective", "sft,ppo"], "--objective is 'ppo'"),
        (["--objective", "sft,dpo", "--packed"], "--packed is True: expected off with dpo"),
        (["--objective", "kto", "--method", "peft-lora"], "expected one of sft, dpo"),
        (["--packed", "--method", "peft-lora"], "--packed is True: expected off with peft-lora"),
        (["--method", "peft-lora", "--peer-python", "no-such-python"], "no-such-python"),
    ],
)
def test_a_mistake_is_refused(folder, arguments, message):
    with pytest.raises(UserError) as found:
        main(["train", "--model", str(folder), *arguments])
    assert message in str(found.value)
