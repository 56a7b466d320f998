"""Each check sees what it is there for."""

import dataclasses
import importlib.metadata
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from milora_jax.config import Config, MeshSection
from milora_jax.data.tokens import Example, load_tokenizer
from milora_jax.doctor import machine
from milora_jax.doctor.machine import fit_finding
from milora_jax.doctor.rows import example_findings, length_finding, prompt_finding
from milora_jax.doctor.template import chat_findings
from milora_jax.doctor.versions import installed_versions, requirements, version_findings
from milora_jax.errors import UserError
from milora_jax.scaling.chips import GIB
from milora_jax.storage.workdir import read_workdir_config
from tests.data.chats import CHATML, LLAMA3, MISTRAL, chat_tokenizer
from tests.doctor.runs import bad, config_of, looked_at, write_inputs, write_rows, write_workdir
from tests.models import write_hf_directory
from tests.storage.adapters import flip

pytest.importorskip("transformers", reason="the doctor looks at tokenizers")
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {line.name: line for line in map(Requirement, PROJECT["dependencies"])}
GOOD = dict.fromkeys(REQUIRED, "999999.0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def versions(python=(3, 11), config=None, required=REQUIRED, **installed):
    return bad(version_findings(config, required, {**GOOD, **installed}, python))


def test_versions_that_do_not_go_together():
    assert versions() == []
    (pair,) = versions(jax="0.11.1", flax="0.12.8")
    assert "jax 0.11.1 does not work with flax 0.12.8: pip install 'jax<0.11.1', or a newer flax" in pair
    assert versions(jax="0.11.0", flax="0.12.8") == versions(jax="0.11.2", flax="0.12.9") == []
    assert "flax 0.12.7 is too old" in versions(flax="0.12.7")[0]
    assert "Python 3.10: expected 3.11 to 3.13" in versions(python=(3, 10))[0]
    assert "Python 3.14" in versions(python=(3, 14))[0]


def test_what_the_config_needs_must_be_there():
    chat = Config.from_dict({"data": {"template": "chat", "train": "a.jsonl,b=hf:gsm8k"}})
    absent = {"transformers": None, "datasets": None, "jinja2": None}
    assert versions(**absent) == []
    found = "".join(versions(config=chat, **absent))
    for said in (
        "transformers is missing, which training needs: pip install 'transformers>=4.56'",
        "datasets is missing",
        "jinja2 is missing, which data.template=chat needs",
    ):
        assert said in found


def test_the_floors_are_those_of_the_package(monkeypatch):
    lines = list(PROJECT["dependencies"])
    for extra, packages in PROJECT["optional-dependencies"].items():
        lines += [f'{package}; extra == "{extra}"' for package in packages]
    monkeypatch.setattr(importlib.metadata, "requires", {"milora-jax": lines}.__getitem__)
    found = {name: str(one.specifier) for name, one in requirements().items()}
    floors = dict(line.split(">=") for line in PROJECT["dependencies"])
    assert found == {name: f">={floor}" for name, floor in floors.items()} | {
        "tensorboardX": ">=2.6",
        "wandb": ">=0.19",
    }
    assert installed_versions(["jax", "no-such-package"]).popitem() == ("no-such-package", None)
    assert installed_versions(found)["jax"] is not None


def test_a_candidate_counts_as_its_release():
    assert versions(jax="0.10.2rc1", flax="0.13.0.dev20260101+gabc") == []
    assert "jax 0.11.1.dev1 does not work with flax" in versions(jax="0.11.1.dev1", flax="0.12.8")[0]


def test_a_checkout_that_is_not_installed_has_no_floors(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert requirements() == {}
    (line,) = versions(required={}, numpy="0.1")
    assert "milora-jax is not installed, so nothing says which versions it requires" in line
    chat = Config.from_dict({"data": {"template": "chat"}})
    assert "jinja2 is missing, which data.template=chat needs: pip install 'jinja2'" in "".join(
        versions(config=chat, required={}, jinja2=None)
    )


def test_a_run_that_does_not_fit():
    assert fit_finding(8.0 * GIB, 1.0 * GIB, 24.0 * GIB, scored=True).level == "ok"
    for (*sizes, scored), level, said in (
        ((14, 1, 8, False), "fail", "does not fit; --config.model.dtype=bfloat16"),
        ((14, 1, 16, True), "warn", "scoring holds the base twice, 29.0 GiB"),
        ((14, 1, 16, False), "warn", "little is left for activations"),
    ):
        finding = fit_finding(*(float(size * GIB) for size in sizes), scored)
        assert (finding.level, said in finding.text) == (level, True)


def test_memory_counts_the_shards_and_the_devices(inputs, monkeypatch):
    monkeypatch.setattr(machine, "host_memory", lambda: 1000)
    (finding,) = looked_at("memory", config_of(inputs))
    assert finding.level == "fail"
    monkeypatch.setattr(machine, "host_memory", lambda: 2**40)
    split = dataclasses.replace(config_of(inputs), mesh=MeshSection(data=4, tensor=2))
    whole, half = (looked_at("memory", each)[0].text.split()[1] for each in (config_of(inputs), split))
    assert float(half) == pytest.approx(float(whole) / 2, abs=0.06)


def test_a_mesh_that_divides_nothing(inputs):
    for mesh, message in ((MeshSection(data=3), "does not fit 8"), (MeshSection(tensor=8), "num_heads")):
        with pytest.raises(UserError, match=message):
            looked_at("mesh", dataclasses.replace(config_of(inputs), mesh=mesh))


def test_answers_are_divided_over_their_own_mesh(inputs):
    config = dataclasses.replace(config_of(inputs), mesh=MeshSection(fsdp=8))
    few = dataclasses.replace(config.eval, batch_size=2)
    with pytest.raises(
        UserError, match=r"eval\.batch_size is 2: expected a multiple of mesh data x fsdp = 8"
    ):
        looked_at("mesh", dataclasses.replace(config, eval=few))
    of_two = dataclasses.replace(few, mesh="fsdp=2,tensor=4")
    (finding,) = looked_at("mesh", dataclasses.replace(config, eval=of_two))
    assert finding.level == "ok"


def test_a_base_that_is_not_whole(inputs, tmp_path):
    write_hf_directory(tmp_path / "model")
    config = dataclasses.replace(config_of(inputs, max_length=513), model=config_of(tmp_path).model)
    assert "data.max_length is 513: expected at most the model's 512" in bad(looked_at("base", config))[0]
    values = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**values, "eos_token_id": None}))
    assert "names no eos_token_id" in bad(looked_at("base", config))[0]
    (tmp_path / "model/model.safetensors").unlink()
    assert "holds no .safetensors file" in bad(looked_at("base", config))[0]
    (tmp_path / "model/config.json").write_text(json.dumps({**values, "vocab_size": 300}))
    assert "3 of 303 tokens have no embedding, the model has 300" in bad(looked_at("tokenizer", config))[0]
    (tmp_path / "model/config.json").write_text(json.dumps({**values, "vocab_size": 200}))
    assert "the model has 200: it is another model's tokenizer" in bad(looked_at("tokenizer", config))[0]


@pytest.mark.parametrize(("template", "end"), [(LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>")])
def test_a_chat_template_that_is_well(tmp_path, template, end):
    tokenizer = chat_tokenizer(tmp_path, template)
    (finding,) = chat_findings(tokenizer, (tokenizer.convert_tokens_to_ids(end),))
    assert (finding.level, end in finding.text) == ("ok", True)


@pytest.mark.parametrize(
    ("template", "level", "said"),
    [
        (CHATML, "warn", "it ends a turn with <|im_end|> Ċ, none of eos_token_id </s>: tuned answers get"),
        (CHATML.split("{%- if")[0], "warn", "writes no generation prompt"),
        ("{{ bos_token }}hello", "fail", "leaves out what the messages say"),
    ],
)
def test_a_chat_template_that_is_not(tmp_path, template, level, said):
    found = list(chat_findings(chat_tokenizer(tmp_path, template), (2,)))
    assert {finding.level for finding in found} == {level}
    assert any(said in finding.text for finding in found)


def test_a_chat_template_that_is_not_there(inputs):
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        looked_at("template", config_of(inputs, template="chat"))


def test_rows_that_are_too_long():
    assert length_finding("train", [5] * 99 + [40], 40).level == "ok"
    some = length_finding("train", [5] * 99 + [40], 39)
    assert (
        some.level,
        some.text.endswith("1 of 100 rows dropped: --config.data.max_length=40 keeps all"),
    ) == (
        "warn",
        True,
    )
    assert length_finding("train", [5, 6], 4).level == "fail"
    assert prompt_finding([3, 90], 100).level == "ok"
    assert prompt_finding([3, 101], 100).level == prompt_finding([0, 9], 100).level == "fail"


@pytest.mark.parametrize(
    ("tokens", "prompt", "level", "said"),
    [
        ([1, 1, 5, 6], 3, "fail", "1 of 2 rows begin with two beginning-of-sequence tokens"),
        ([5, 6], 0, "fail", "1 of 2 rows have a prompt without tokens"),
        ([1, 5, 6], 3, "fail", "no token to learn (all-zero loss mask)"),
        ([1, 5, 2], 2, "warn", "an answer of the end token alone"),
    ],
)
def test_rows_from_which_nothing_can_be_learned(tokens, prompt, level, said):
    good = Example(np.array([1, 5, 6, 2], np.int32), 2)
    assert bad(example_findings("train", [good], 1)) == []
    found = list(example_findings("train", [good, Example(np.array(tokens, np.int32), prompt)], 1))
    assert any(f.level == level and said in f.text for f in found)


def test_a_tokenizer_that_doubles_the_beginning(inputs, monkeypatch):
    """One that adds its tokens though it was asked to add none."""
    tokenizer = load_tokenizer(str(inputs / "model"))
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **more: [1, 1, *encode(text, **more)])
    monkeypatch.setattr("milora_jax.doctor.subject.load_tokenizer", lambda path: tokenizer)
    found = bad(looked_at("tokens", config_of(inputs), after=["rows"]))
    assert "16 of 16 rows begin with two beginning-of-sequence tokens" in found[0]


def test_rows_are_read_by_their_columns(inputs):
    named = {split: f"{split}={inputs}/{split}.jsonl" for split in ("train", "dev", "test")}
    found = looked_at("rows", config_of(inputs, **named, columns="references=output,test:references=output"))
    assert [finding.text for finding in found] == [f"rows read: {split} 16" for split in named]
    (found,) = bad(looked_at("rows", config_of(inputs, **named, columns="dev:input=facts")))
    assert "dev.jsonl:1: there is no column 'facts'" in found
    with pytest.raises(UserError, match="there is no source 'valid', expected dev, test, train"):
        looked_at("rows", config_of(inputs, **named, columns="valid:input=facts"))


def test_rows_that_are_in_two_files_or_templated_already(inputs, tmp_path):
    write_rows(tmp_path / "test.jsonl", 10, 16)  # six of them are training rows
    row = {"instruction": "Hi\n\n### Response:\n", "output": "x</s>"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    config = config_of(inputs, test=f"test={tmp_path}/test.jsonl", dev=str(tmp_path / "dev.jsonl"))
    found = bad(looked_at("overlap", config, after=["rows"]))
    assert "test: 6 of 16 prompts are in the training rows as well" in found[0]
    assert "1 of 1 rows hold a template's words or control tokens as text" in found[1]


def test_a_workdir_that_is_damaged_foreign_or_empty(inputs, tmp_path):
    config, workdir = config_of(inputs), tmp_path / "w"
    workdir.mkdir()
    assert "holds no checkpoint yet" in bad(looked_at("workdir", None, workdir, config))[0]
    write_workdir(workdir, config)
    config = read_workdir_config(workdir)
    assert bad(looked_at("workdir", config, workdir, config)) == []
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=3))
    (settings,) = bad(looked_at("workdir", other, workdir, config))
    assert "train.seed is 0 there and 3 now; use another --workdir" in settings
    write_hf_directory(tmp_path / "model", seed=1)
    foreign = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(tmp_path / "model"))
    )
    assert "made on another base" in bad(looked_at("workdir", None, workdir, foreign))[0]
    flip(next(path for path in (workdir / "best").rglob("d/*") if path.is_file()))
    found = bad(looked_at("workdir", None, workdir, config))
    assert "fail  checkpoints best/7: damaged:" in found[0]
    assert "put a good copy back, or delete" in found[0]
    assert "holds no complete adapter" in str(found[1:]) or len(found) == 2
