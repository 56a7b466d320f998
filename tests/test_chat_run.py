"""A run on chats: trained, scored and continued with the tokenizer's own template."""

import dataclasses
import json
import sys

import pytest

import train
from milora_jax.commands import evaluation, generation
from milora_jax.config import AdapterSection, Config, EvalSection, ModelSection
from milora_jax.data.chat import Message, encode_chat
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from milora_jax.evaluation.score import score_task
from milora_jax.training.prepare import prepare_run
from tests.data.chats import CHATML, HERMES, LLAMA3, write_chat_tokenizer
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.training.runs import command

SYSTEM = "You add."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    write_hf_directory(folder / "model", tokenizer=False)
    write_chat_tokenizer(folder / "model", LLAMA3)
    write_hf_directory(folder / "plain")
    rows = []
    for i in range(20):
        turns = [("system", SYSTEM), ("user", f"{i} + 1?"), ("assistant", f"{i + 1}"), ("user", "Why?")]
        turns.append(("assistant", f"So it is, {i}."))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder, model="model", **data):
    files = {name: str(folder / "rows.jsonl") for name in ("train", "test")}
    values = {"template": "chat", "max_length": 128, **files, **data}
    return Config.from_dict({"model": {"path": str(folder / model)}, "data": values})


@pytest.mark.parametrize(
    ("more", "rows"), [({}, "38 train, 2 dev"), ({"dev": True, "dev_limit": 3}, "40 train, 6 dev")]
)
def test_dev_rows_are_limited_by_whole_chats(folder, more, rows):
    said = []
    more = {"dev_limit": 1, "dev_share": 0.5, **more}
    if more.pop("dev", False):
        more["dev"] = str(folder / "rows.jsonl")
    config = dataclasses.replace(config_of(folder, **more), eval=EvalSection(limit=4))
    run = prepare_run(config, None, said.append)
    assert f"{len(run.train)} train, {len(run.dev)} dev" == rows
    assert said[-1].endswith(" 40 test (at most 4 of a task are scored)")


def test_a_run_reads_every_split_by_its_columns(folder, tmp_path):
    """Train, dev and test of other names; a chat, a row with a system message and a plain one in one file."""
    lines = (folder / "rows.jsonl").read_text().splitlines()[:2]
    extra = [{"prompt": "add 1 and 1", "system": SYSTEM, "answers": "2"}, {"prompt": "add 1", "answers": "3"}]
    chats = [{"talk": json.loads(line)["messages"]} for line in lines]
    pairs = [{"prompt": "add 1", "texts": text} for text in ("2", "two", "2")]
    for name, rows in {"plain": extra, "chats": chats, "pairs": pairs}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "plain:instruction=prompt,plain:output=answers,chats:messages=talk"
    data = {
        "train": f"{tmp_path}/plain.jsonl,{tmp_path}/chats.jsonl",
        "dev": f"pairs={tmp_path}/pairs.jsonl",
        "test": f"pairs={tmp_path}/pairs.jsonl",
        "columns": f"{columns},pairs:instruction=prompt,pairs:references=texts",
    }
    run = prepare_run(config_of(folder, **data), None, lambda line: None)
    assert (len(run.train), len(run.dev)) == (2 + 4, 3)
    (record,) = run.tests["pairs"]
    assert (record.instruction, record.references) == ("add 1", ("2", "two"))
    with pytest.raises(UserError, match="there is no source 'pair', expected chats, pairs, plain"):
        prepare_run(config_of(folder, **{**data, "columns": "pair:input=x"}), None, print)
    with pytest.raises(UserError, match="chat"):
        prepare_run(config_of(folder, **data, template="alpaca"), None, print)


def taken_by(monkeypatch, module):
    """The prompts that a module gives to ``generate``, which is not run."""
    taken = []

    def take(base, config, tokenizer, prompts, **more):
        taken.extend(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate", take)
    return taken


def test_training_scoring_and_generation_take_the_same_tokens(folder, monkeypatch):
    said = []
    run = prepare_run(config_of(folder, dev=str(folder / "rows.jsonl")), None, said.append)
    assert "rows: 40 train (0 longer than 128 tokens dropped), 40 dev (0 dropped), 40 test" in said
    trained = [example.tokens[: example.prompt_length].tolist() for (example,) in run.train]
    chat = [Message("system", SYSTEM), Message("user", "0 + 1?")]
    tokenizer = load_tokenizer(str(folder / "model"))
    assert trained[0] == encode_chat(tokenizer, chat)
    assert trained[1] == encode_chat(tokenizer, [*chat, Message("assistant", "1"), Message("user", "Why?")])
    scored = taken_by(monkeypatch, sys.modules[score_task.__module__])
    with pytest.raises(KeyboardInterrupt):
        score_task(
            run.base,
            run.model,
            tokenizer,
            None,
            "rows",
            run.tests["rows"],
            run.config.eval,
            prompt_format=run.config.prompt_format,
        )
    assert [prompt.ids for prompt in scored] == trained
    asked = taken_by(monkeypatch, generation)
    question = ["--base", str(folder / "model"), "--chat", "--system", SYSTEM, "--prompt", "0 + 1?"]
    monkeypatch.setattr(sys, "argv", ["generation", *question])
    with pytest.raises(KeyboardInterrupt):
        generation.main()
    assert [prompt.ids for prompt in asked] == trained[:1]


def test_the_template_is_part_of_what_a_resumed_run_compares(folder, tmp_path):
    prints = []
    for template in (LLAMA3, LLAMA3 + "\n", LLAMA3):
        write_chat_tokenizer(folder / "model", template)
        prints.append(prepare_run(config_of(folder), None, lambda line: None).data_fingerprint)
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"template": "alpaca"},
            "a history or tools, and data.template is 'alpaca': expected data.template=chat",
        ),
        ({"template": "chatml"}, "data.template is 'chatml': expected one of alpaca, chat"),
        ({"model": "plain"}, "the tokenizer has no chat template"),
    ],
)
def test_a_run_that_cannot_word_its_rows_is_refused(folder, more, message):
    with pytest.raises(UserError) as caught:
        prepare_run(config_of(folder, **more), None, lambda line: None)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw", "--chat", "--prompt", "x"], "expected --raw, or --chat and --system"),
        (["--system", "x", "--prompt", "x"], "--system is of chats: expected --chat, or a run with"),
        (["--chat", "--system", "x", "--file", "{rows}"], "a chat begins with a system message"),
        (["--file", "{rows}"], "a row is a chat, or holds a system message"),
        (["--chat", "--file", "{answered}"], "answered.jsonl:1: the last message is of the assistant"),
    ],
)
def test_the_generation_command_refuses_what_is_no_question(
    folder, tmp_path, monkeypatch, arguments, message
):
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    files = {"rows": tmp_path / "rows.jsonl", "answered": tmp_path / "answered.jsonl"}
    files["answered"].write_text(json.dumps(row))
    files["rows"].write_text(json.dumps({"messages": row["messages"][:2]}))
    given = [argument.format(**files) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["generation", "--base", str(folder / "model"), *given])
    with pytest.raises(UserError) as caught:
        generation.main()
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_run_on_chats(folder, tmp_path, monkeypatch, capsys):
    """Trained and scored; its own evaluation and generation word prompts as it did, unasked."""
    write_chat_tokenizer(folder / "model", LLAMA3)
    workdir = tmp_path / "w"
    settings = {
        "data.template": "chat",
        "data.train": folder / "rows.jsonl",
        "data.test": folder / "rows.jsonl",
        "data.max_length": 128,
        "data.pack": True,
        "adapter.dropout": 0.0,
        "mesh.data": -1,
        "train.batch_size": 8,
        "train.learning_rate": 2e-2,
        "eval.batch_size": 8,
        "train.max_steps": 20,
        "train.eval_every": 10,
        "train.save_every": 20,
        "eval.limit": 4,
        "eval.max_new_tokens": 4,
    }
    monkeypatch.setattr(sys, "argv", command(folder, workdir, **settings)[1:])
    train.main()
    shown = capsys.readouterr().out
    assert "<|start_header_id|>user<|end_header_id|>\n\n0 + 1?<|eot_id|>" in shown
    summary = json.loads((workdir / "summary.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    monkeypatch.setattr(
        sys,
        "argv",
        ["evaluation", "--workdir", str(workdir), "--limit", "4", "--predictions", str(tmp_path / "p")],
    )
    evaluation.main()
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["accuracy"]["adapter"]
    assert (tmp_path / "p").read_text() == (workdir / "predictions.jsonl").read_text()
    ask = ["generation", "--workdir", str(workdir), "--json", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", [*ask, "--system", SYSTEM, "--prompt", "0 + 1?"])
    generation.main()
    (answer,) = json.loads(capsys.readouterr().out)["samples"]
    first = json.loads((tmp_path / "p").read_text().splitlines()[0])
    assert answer["text"] == first["generated"]


@pytest.mark.thorough
@pytest.mark.parametrize("part", ["prompt", "first_turn", "system"])
def test_a_run_takes_a_conversation_as_one_example_where_it_has_one_route(folder, tmp_path, part):
    write_hf_directory(tmp_path / "model", dataclasses.replace(WITH_TOKENIZER, eos_ids=(9,)), tokenizer=False)
    write_chat_tokenizer(tmp_path / "model", CHATML)
    config = config_of(folder, dev=str(folder / "rows.jsonl"))
    config = dataclasses.replace(
        config,
        model=ModelSection(path=str(tmp_path / "model")),
        adapter=AdapterSection(route_on=part),
    )
    said = []
    run = prepare_run(config, None, said.append)
    count = 40 if part == "prompt" else 20
    assert f"rows: {count} train (0 longer than 128 tokens dropped), {count} dev (0 dropped), 40 test" in said
    ((example,), *_) = run.train
    text = run.tokenizer.decode(example.tokens[: example.routed])
    answers = [run.tokenizer.decode(example.tokens[start:stop]) for start, stop in example.learned]
    system = "<|im_start|>system\nYou add.<|im_end|>\n"
    first = f"{system}<|im_start|>user\n0 + 1?<|im_end|>\n"
    assert text == {"system": system, "first_turn": first, "prompt": f"{first}<|im_start|>assistant\n"}[part]
    assert answers == ["1<|im_end|>", "So it is, 0.<|im_end|>"][: 1 if part == "prompt" else 2]
    with pytest.raises(UserError, match=r"route_on is 'system', and data\.template is 'alpaca'"):
        prepare_run(
            dataclasses.replace(
                config_of(folder, template="alpaca"), adapter=AdapterSection(route_on="system")
            ),
            None,
            said.append,
        )


def test_a_run_learns_calls_of_tools_and_generation_offers_them(folder, tmp_path, monkeypatch):
    write_hf_directory(tmp_path / "model", tokenizer=False)
    write_chat_tokenizer(tmp_path / "model", HERMES)
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = []
    for i in range(4):
        ask, call = {"role": "user", "content": f"{i} + 1?"}, {"name": "add", "arguments": {"a": i, "b": 1}}
        turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": f"{i + 1}"}]
        answer = {"role": "assistant", "content": f"It is {i + 1}."}
        rows.append({"messages": [ask, *turns, answer], "tools": tools})
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test", "asked")}
    files["train"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        row["messages"][1]["weight"] = 0
    files["test"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["asked"].write_text(json.dumps({"tools": tools, "messages": rows[0]["messages"][:1]}))
    data = {name: str(files[name]) for name in ("train", "test")}
    config = config_of(tmp_path, dev=str(files["train"]), max_length=400, **data)
    said = []
    run = prepare_run(config, None, said.append)
    assert "rows: 8 train (0 longer than 400 tokens dropped), 8 dev (0 dropped), 4 test" in said
    (call,) = run.train[0]
    begin, end = call.learned[0]
    learned = '<tool_call>{"name": "add", "arguments": {"a": 0, "b": 1}}</tool_call><|im_end|>'
    assert run.tokenizer.decode(call.tokens[begin:end]).startswith(learned)
    assert [record.output for records in run.tests.values() for record in records] == [
        f"It is {i + 1}." for i in range(4)
    ]
    asked = taken_by(monkeypatch, generation)
    question = ["--base", str(tmp_path / "model"), "--chat", "--file", str(files["asked"])]
    monkeypatch.setattr(sys, "argv", ["generation", *question])
    with pytest.raises(KeyboardInterrupt):
        generation.main()
    assert asked[0].ids == call.tokens[:begin].tolist()
