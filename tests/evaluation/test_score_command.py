"""``python -m milora_jax.evaluation``: what it asks, keeps, prints and refuses."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.commands.evaluation import main
from milora_jax.data.records import Record, read_records
from milora_jax.data.sources import Source
from milora_jax.errors import EXIT_PREEMPTED, Preempted, UserError
from milora_jax.evaluation import plan
from milora_jax.evaluation.loss import Loss
from milora_jax.evaluation.subject import Model, Subject
from milora_jax.generation.text import Answer, Continuation
from milora_jax.storage.export import export_milora
from milora_jax.storage.files import read_json, write_json_atomic
from tests.models import write_hf_directory
from tests.storage.adapters import run_of

ROWS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a run on it, the run's export, and files of rows."""
    folder = tmp_path_factory.mktemp("scored")
    write_hf_directory(folder / "model")
    run_of(folder / "run", folder / "model", "milora")
    export_milora(folder / "run", folder / "export")
    sums = [
        {"instruction": f"{'add ' * i}{i}", "output": f"It is {i}", "answer": f"{i}"} for i in range(ROWS)
    ]
    truths = [{"instruction": f"Is {i} even?", "output": "", "answer": "true"} for i in range(3)]
    for name, rows in {"sums": sums, "truths": truths, "torn": [*sums[:1], {"input": ""}]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder / "model", decode=True)[0]


class Losses:
    """A ``response_loss`` without a model.

    Attributes:
      asked: numbers of rows.
    """

    def __init__(self):
        self.asked = []

    def __call__(self, base, config, adapter, responses, rows, *, layout, advance):
        self.asked.append(len(responses.passages))
        advance(len(responses.passages))
        tokens = sum(passage.scored for passage in responses.passages)
        return Loss(1.5 if tokens else None, len(responses.passages), tokens, responses.left_out)


@pytest.fixture
def losses():
    return Losses()


@pytest.fixture
def answered(base, losses, monkeypatch):
    """Prompts and settings that a ``generate`` without a model was asked; row 5 is not answered."""
    asked = []

    def generate(base, config, tokenizer, prompts, *, adapter, settings, batch_size, prefill_rows, layout):
        asked.append((len(prompts), settings))
        texts = [tokenizer.decode(prompt.ids).split("Instruction:\n")[1].split("\n")[0] for prompt in prompts]
        route = np.tile(np.array([1.0, 0, 0, 0, 0, 0, 0.5], np.float32), (2, 1))
        words = ["none" if text.endswith(" 5") else f"It is {text.split()[-1]}" for text in texts]
        return [Answer((Continuation(word, (4,), "stop"),), route) for word in words]

    monkeypatch.setattr(plan, "generate", generate)
    monkeypatch.setattr(plan, "response_loss", losses)

    def load(self, mesh=None):
        return Model(self.named.base, base, self.config, self.tokenizer, None, self.prompt_format)

    monkeypatch.setattr(Subject, "load", load)
    return asked


@pytest.fixture
def command(folder, tmp_path, capsys, monkeypatch):
    """Run the command on the run; gives its JSON and what it told."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, subject=("--workdir", folder / "run")):
        try:
            main([str(argument) for argument in (*subject, *arguments)])
        finally:
            told = capsys.readouterr()
        return json.loads(told.out), told.err

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.thorough
def test_an_export_scores_as_the_run_it_is_of(folder, command, tmp_path):
    more = ("--data", folder / "sums.jsonl", "--dtype", "float32", "--max-new-tokens", 3, "--batch-size", 4)
    expected, _ = command(*more, "--predictions", "run.jsonl")
    export = ("--adapter", folder / "export", "--base", folder / "model")
    found, told = command(*more, subject=export)
    assert found == expected
    own = tmp_path / "evaluation-sums.jsonl"
    assert own.read_text() == (tmp_path / "run.jsonl").read_text()
    assert all(line["route"] is not None for line in lines_of(own))
    assert "predictions: evaluation-sums.jsonl" in told
    assert "--no-adapter" in told
    command(*more, subject=("--base", folder / "model"))
    assert all(line["route"] is None for line in lines_of(tmp_path / "evaluation-base-sums.jsonl"))


def test_what_it_prints_and_keeps(folder, command, answered, tmp_path):
    found, told = command("--data", folder / "sums.jsonl", "--batch-size", 3, "--predictions", "p.jsonl")
    assert found["accuracy"] == {"sums": 6 / 7, "mean": 6 / 7}
    assert found["rows"] == {"sums": 7}
    assert found["unread"] == {"sums": 1}
    assert found["rule"] == {"sums": "number"}
    assert found["interval"]["sums"] == pytest.approx([0.4869, 0.9743], abs=1e-4)
    assert [count for count, _ in answered] == [3, 3, 1]
    assert "scoring 7/7 rows: 85.7% right, " in told
    assert " rows/s" in told
    assert " 85.7%    48.7 to 97.4%       7       1" in told
    lines = lines_of(tmp_path / "p.jsonl")
    assert [line["row"] for line in lines] == list(range(ROWS))
    assert [line["unread"] for line in lines] == [row == 5 for row in range(ROWS)]
    assert [line["correct"] for line in lines] == [row != 5 for row in range(ROWS)]
    assert lines[5]["extracted"] == ""
    assert lines[3]["rule"] == "number"
    assert lines[3]["route"] == [{"Q": 1.0, "D": 0.5}] * 2
    assert json.loads((tmp_path / "p.result.json").read_text())["result"] == found


def test_the_loss_is_that_of_the_outputs(folder, command, answered):
    """Rows that give an answer alone have none; they are scored all the same."""
    data = f"sums={folder / 'sums.jsonl'},truths={folder / 'truths.jsonl'}"
    found, told = command("--data", data)
    assert found["loss"] == {"sums": 1.5, "truths": None}
    assert found["perplexity"] == {"sums": pytest.approx(4.4817, abs=1e-4), "truths": None}
    scored = found["loss_rows"]
    assert (scored["sums"]["scored"], scored["sums"]["left_out"]) == (ROWS, {})
    assert scored["truths"] == {"scored": 0, "tokens": 0, "left_out": {"no_output": 3}}
    assert found["measures"] == {}
    assert "note: truths: 3 of 3 rows have no loss (no output: 3)" in told
    assert f"loss {ROWS}/{ROWS} rows" in told


@pytest.mark.thorough
def test_free_text_is_measured_and_its_references_are_kept(folder, command, answered, tmp_path, monkeypatch):
    more = ("--predictions", "p.jsonl", "--data")
    asked = {"references": ("It is 0", "It is nothing at all"), "output": "It is nothing at all"}
    rows = [Record("add 0", "", asked["output"], asked["output"], references=asked["references"])]
    monkeypatch.setattr(plan, "read_records", lambda source, scored: rows)
    found, told = command(*more, "told=some.jsonl")
    assert found["measures"]["told"]["bleu"] == 0  # three words have no sequence of four
    assert found["measures"]["told"]["rouge_l"] == 100
    assert found["measures"]["told"]["chrf"] == 100
    assert found["accuracy"]["told"] == 0  # by the rule that compares all of an answer
    assert told.count("ROUGE-L") == 1
    (line,) = lines_of(tmp_path / "p.jsonl")
    assert line["references"] == list(asked["references"])
    assert command(*more, "told=some.jsonl")[0] == found
    assert len(answered) == 1
    command("--predictions", "sums.jsonl", "--data", folder / "sums.jsonl")


def test_a_loss_that_an_earlier_version_did_not_compute_is_added(folder, command, answered, losses, tmp_path):
    same = ("--data", folder / "sums.jsonl", "--predictions", "p.jsonl")
    expected, _ = command(*same)
    beside = tmp_path / "p.result.json"
    kept = json.loads(beside.read_text())
    for name in ("loss", "perplexity", "loss_rows", "measures"):
        del kept["result"][name]
    beside.write_text(json.dumps(kept))
    assert command(*same)[0] == expected
    assert (len(answered), losses.asked) == (1, [ROWS, ROWS])
    assert json.loads(beside.read_text())["result"] == expected


def test_a_kill_during_the_losses_costs_nothing_but_them(
    folder, command, answered, losses, tmp_path, monkeypatch
):
    more = ("--data", folder / "sums.jsonl", "--batch-size", 2)
    expected, _ = command(*more, "--predictions", "whole.jsonl")
    batches = len(answered)

    def interrupted(*given, **named):
        losses(*given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "response_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(*more, "--predictions", "cut.jsonl")
    monkeypatch.setattr(plan, "response_loss", losses)
    assert command(*more, "--predictions", "cut.jsonl")[0] == expected
    assert len(answered) == 2 * batches
    for name in ("jsonl", "result.json"):
        assert (tmp_path / f"cut.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()


def test_an_interrupted_evaluation_ends_as_an_undisturbed_one(
    folder, command, answered, tmp_path, monkeypatch
):
    more = ("--data", folder / "sums.jsonl", "--batch-size", 2)
    expected, _ = command(*more, "--predictions", "whole.jsonl")
    whole, generate = len(answered), plan.generate

    def interrupted(*given, **named):
        if len(answered) == whole + 2:
            raise KeyboardInterrupt
        return generate(*given, **named)

    monkeypatch.setattr(plan, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(*more, "--predictions", "cut.jsonl")
    monkeypatch.setattr(plan, "generate", generate)
    with open(tmp_path / "cut.jsonl", "ab") as file:
        file.write(b'{"task": "sums", "row"')
    found, told = command(*more, "--predictions", "cut.jsonl")
    assert "4 of 7 rows are in cut.jsonl already" in told
    assert len(answered) == whole + 4
    assert found == expected
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "cut.result.json").read_bytes() == (tmp_path / "whole.result.json").read_bytes()


def test_sigterm_keeps_the_batch_that_was_under_way(folder, command, answered, tmp_path, monkeypatch):
    generate = plan.generate

    def terminated(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(*given, **named)

    monkeypatch.setattr(plan, "generate", terminated)
    with pytest.raises(Preempted, match="run the same command again to continue") as caught:
        command("--data", folder / "sums.jsonl", "--batch-size", 2, "--predictions", "p.jsonl")
    assert caught.value.exit_code == EXIT_PREEMPTED
    assert len(lines_of(tmp_path / "p.jsonl")) == 2


def test_a_finished_evaluation_asks_nothing_and_reads_no_base(folder, command, answered, monkeypatch):
    more = ("--data", folder / "sums.jsonl", "--predictions", "p.jsonl")
    expected, _ = command(*more)
    asked = len(answered)
    monkeypatch.setattr(Subject, "load", lambda self: pytest.fail("the base is read"))
    assert command(*more)[0] == expected
    assert len(answered) == asked


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (("--beams", 3), "beams 1, this command has 3"),
        (("--limit", 4), "tasks.sums.rows 7, this command has 4"),
        (("--no-adapter",), "adapter "),
        (("--max-new-tokens", 9), "tasks.sums.max_new_tokens 64, this command has 9"),
    ],
)
def test_predictions_of_other_settings_are_not_mixed(folder, command, answered, more, difference):
    same = ("--data", folder / "sums.jsonl", "--predictions", "p.jsonl")
    command(*same)
    with pytest.raises(UserError, match="give --fresh to begin again") as caught:
        command(*same, *more)
    assert f"p.jsonl was made with {difference}" in str(caught.value)
    command(*same, *more, "--fresh")


def test_end_tokens_are_of_the_settings(folder, command, answered):
    """They stand in a file that the base's fingerprint leaves out, and people are told to edit it."""
    same = ("--data", folder / "sums.jsonl", "--predictions", "p.jsonl")
    command(*same)
    beside = folder / "model" / "generation_config.json"
    assert not beside.exists()
    beside.write_text('{"eos_token_id": [2, 5]}')
    try:
        with pytest.raises(
            UserError, match=r"p.jsonl was made with end_tokens \[2\], this command has \[2, 5\]"
        ):
            command(*same)
    finally:
        beside.unlink()


def test_whoever_names_a_task_gets_its_protocol(folder, command, answered, monkeypatch):
    found, told = command("--task", "SVAMP", "--data", folder / "sums.jsonl", "--beams", 4)
    assert found["max_new_tokens"] == {"SVAMP": 256}
    assert {(s.max_new_tokens, s.num_beams) for _, s in answered} == {(256, 4)}
    assert "note: SVAMP: 7 rows, LLM-Adapters' test file has 1000" in told
    answered.clear()
    command("--data", f"svamp={folder / 'sums.jsonl'}")
    assert {(s.max_new_tokens, s.num_beams) for _, s in answered} == {(64, 1)}
    answered.clear()
    records = read_records(Source("truths", str(folder / "truths.jsonl")), scored=True)
    monkeypatch.setattr(plan, "hub_records", lambda task: records)
    found, told = command("--task", "boolq")
    assert found["rows"] == {"boolq": 3}
    assert {(s.max_new_tokens, s.num_beams) for _, s in answered} == {(32, 1)}
    assert "loading boolq from the Hub" in told


def test_strict_rules_are_asked_for(folder, command, answered):
    found, _ = command("--data", folder / "truths.jsonl", "--strict")
    assert found["rule"] == {"truths": "true_false_strict"}
    assert found["unread"] == {"truths": 3}


def test_rows_with_other_names_are_scored_as_their_columns_say(folder, command, answered, tmp_path):
    """By ``--columns`` where files are given, by the run's settings where its own are scored."""
    rows = [{"ask": f"add {i}", "text": f"It is {i}", "gold": f"{i}"} for i in range(3)]
    path = tmp_path / "renamed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "sums:instruction=ask,sums:output=text,sums:answer=gold"
    found, told = command("--data", f"sums={path}", "--columns", columns)
    assert found["accuracy"]["sums"] == 1.0
    assert f"--columns {columns}" in told
    config = read_json(folder / "run" / "config.json")
    data = {**config["data"], "train": f"other={path}", "test": f"sums={path}"}
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    write_json_atomic(run / "config.json", {**config, "data": {**data, "columns": columns}})
    again, _ = command(subject=("--workdir", run))
    assert again == found
    with pytest.raises(UserError, match=r"renamed.jsonl:1: the row is a plain text, .* data\.columns maps"):
        command("--data", f"sums={path}", subject=("--workdir", run))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "input=x"], "--columns 'input=x' is about the rows of --data"),
        (["--data", "{folder}/sums.jsonl", "--columns", "sum:input=x"], "there is no source 'sum'"),
        (["--task", "bolq"], "no task is called 'bolq'"),
        (["--task", "bolq"], "(did you mean 'boolq'?)"),
        (["--data", "{folder}/torn.jsonl"], "torn.jsonl:2: field 'instruction' holds nothing, expected text"),
        (["--beams", "5"], "--beams is 5: expected 1 to 4"),
        (["--beams", "0"], "--beams is 0: expected 1 to 4"),
        (
            ["--task", "boolq", "--data", "{folder}/sums.jsonl"],
            "none of the 7 answers is one of task",
        ),
        (["--task", "boolq,piqa", "--data", "{folder}/sums.jsonl"], "names 2 tasks, --data has 1 files"),
        (
            ["--task", "gsm8k,GSM8K", "--data", "a={folder}/sums.jsonl,b={folder}/truths.jsonl"],
            "task 'gsm8k' is named twice",
        ),
        (["--data", ","], "--data ',' names no file"),
        (["--data", "mean={folder}/sums.jsonl"], "a task must not be called 'mean'"),
        (["--data", "{folder}/sums.jsonl", "--max-new-tokens", "500"], "sums: the prompt of row 0 has "),
        (["--data", "{folder}/sums.jsonl", "--predictions", "no/p.jsonl"], "no such directory as 'no'"),
        (["--adapter", "{folder}/export"], "expected a workdir or an adapter, not both"),
        ([], "nothing to score: give --data FILE or --task NAME"),
    ],
)
def test_bad_input_is_one_line(folder, command, answered, tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        command(*(argument.format(folder=folder) for argument in arguments))
    assert message in str(caught.value)
    assert not answered
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ((), "there is no base: expected a workdir, or a base and perhaps an"),
        (
            ("--adapter", "{folder}/export"),
            "there is no base: expected a workdir, or a base and perhaps an",
        ),
        (("--adapter", "{folder}/export", "--base", "{folder}/other"), "are not those that the adapter of"),
        (("--adapter", "{folder}/none", "--base", "{folder}/model"), "no such directory, expected a workdir"),
        (("--workdir", "{folder}/none"), "is no workdir"),
    ],
)
def test_what_cannot_be_scored_is_one_line(folder, command, subject, message):
    if not (folder / "other").is_dir():
        write_hf_directory(folder / "other", seed=1)
    given = [argument.format(folder=folder) for argument in subject]
    with pytest.raises(UserError) as caught:
        command("--data", folder / "sums.jsonl", subject=given)
    assert message in str(caught.value)
