"""What a run decides about its prompts: one time, the tokens that rows really hold, which dev rows count."""

import dataclasses
import json

import pytest

from milora_jax.config import Config
from milora_jax.errors import UserError
from milora_jax.storage.files import json_bytes
from milora_jax.training import prepare
from tests.data.chats import CHATML, write_chat_tokenizer
from tests.models import WITH_TOKENIZER, write_hf_directory, write_tokenizer

pytest.importorskip("transformers", reason="text needs a tokenizer, which the core does without")

SHALLOW = dataclasses.replace(WITH_TOKENIZER, num_layers=2, eos_ids=(2,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_directory(folder, SHALLOW)
    return folder


def rows_of(path, outputs):
    lines = [json.dumps({"instruction": f"say {i}", "output": output}) for i, output in enumerate(outputs)]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def config_of(model, tmp_path, **data):
    train = rows_of(tmp_path / "train.jsonl", ["x"] * 12)
    return Config.from_dict(
        {"model": {"path": str(model)}, "data": {"train": train, "max_length": 400, **data}}
    )


def prepared(config, workdir=None):
    said = []
    return prepare.prepare_run(config, workdir, said.append), said


class TestTime:
    """A template that asks for the time is told the same one in every life of a run."""

    @pytest.fixture
    def dated(self, tmp_path):
        folder = tmp_path / "dated"
        write_hf_directory(folder, SHALLOW)
        write_chat_tokenizer(folder, "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}\n" + CHATML)
        return folder

    def test_it_is_decided_once_and_stored(self, dated, tmp_path, monkeypatch):
        config = config_of(dated, tmp_path, template="chat")
        monkeypatch.setattr(prepare.time, "time", lambda: 1e9)
        first, _ = prepared(config, tmp_path / "run")
        assert first.config.data.template_time == "2001-09-09T01:46:40"
        monkeypatch.setattr(prepare.time, "time", lambda: 1e9 + 1)
        other, _ = prepared(config, tmp_path / "other")
        assert other.token_fingerprint != first.token_fingerprint
        assert other.data_fingerprint == first.data_fingerprint
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_bytes(json_bytes(first.config.to_dict()))
        again, _ = prepared(config, tmp_path / "run")
        assert again.config == first.config
        assert again.token_fingerprint == first.token_fingerprint

    def test_it_can_be_given(self, dated, tmp_path):
        run, _ = prepared(config_of(dated, tmp_path, template="chat", template_time="2024-07-26"))
        assert run.config.data.template_time == "2024-07-26"
        assert run.tokenizer.decode(run.train[0][0].tokens).startswith("2024-07-26 00:00:00<")

    def test_a_template_that_does_not_ask_is_told_none(self, model, tmp_path):
        run, _ = prepared(config_of(model, tmp_path))
        assert run.config.data.template_time == ""

    @pytest.mark.parametrize("time", ["noon", "2024-13-01", "2024-07-26T00:00:00+02:00"])
    def test_what_is_no_time_is_refused(self, model, tmp_path, time):
        with pytest.raises(UserError, match=r"data\.template_time is .*: expected a time such as"):
            config_of(model, tmp_path, template_time=time)


def test_a_run_from_before_the_setting_goes_on_as_it_was(model, tmp_path):
    config = config_of(model, tmp_path)
    old = prepared(dataclasses.replace(config, data=dataclasses.replace(config.data, special_tokens="bos")))[
        0
    ]
    values = old.config.to_dict()
    for name in ("special_tokens", "template_time"):
        del values["data"][name]
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes(json_bytes(values))
    run, said = prepared(config, workdir)
    assert run.config.data.special_tokens == "bos"
    assert run.token_fingerprint == old.token_fingerprint
    assert any("data.special_tokens=bos, which is kept" in line for line in said)
    assert run.train[0][0].tokens[0] == run.tokenizer.bos_token_id


class TestEmbeddings:
    """A tokenizer may know tokens that the model has no embedding of, as long as no row holds one."""

    @pytest.fixture
    def gapped(self, tmp_path):
        """A token far beyond the embeddings, though there are fewer tokens than embeddings."""
        folder = tmp_path / "gapped"
        write_hf_directory(folder, SHALLOW, tokenizer=False)
        write_tokenizer(folder, 300)
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        values["model"]["vocab"]["~~"] = 5000
        values["model"]["merges"].append(["~", "~"])
        path.write_text(json.dumps(values))
        return folder

    def test_one_that_nobody_uses_is_no_mistake(self, gapped, tmp_path):
        run, _ = prepared(config_of(gapped, tmp_path))
        assert len(run.tokenizer) < run.model.vocab_size

    @pytest.mark.parametrize(
        ("split", "row"),
        [
            ("train", {"instruction": "say", "output": "~~"}),
            ("train", {"instruction": "~~", "output": "x"}),
            ("dev", {"instruction": "say", "output": "~~"}),
            ("test", {"instruction": "say ~~", "output": "x"}),
        ],
    )
    def test_one_that_a_row_holds_is_named(self, gapped, tmp_path, split, row):
        rows = [{"instruction": f"say {i}", "output": "x"} for i in range(12)]
        path = tmp_path / "far.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in [*rows[:6], row, *rows[6:]]))
        with pytest.raises(UserError, match=r"far\.jsonl:7: token 5000 \('~~'\): expected 0 to 319"):
            prepared(config_of(gapped, tmp_path, **{split: str(path)}))

    def test_more_tokens_than_embeddings_is_no_mistake_either(self, tmp_path):
        small = dataclasses.replace(SHALLOW, vocab_size=330)
        write_hf_directory(tmp_path / "m", small)
        from milora_jax.data.tokens import load_tokenizer

        tokenizer = load_tokenizer(str(tmp_path / "m"))
        tokenizer.add_tokens([f"<image{i}>" for i in range(331 - len(tokenizer))])
        assert len(tokenizer) == 331
        tokenizer.save_pretrained(tmp_path / "m")
        run, _ = prepared(config_of(tmp_path / "m", tmp_path))
        assert len(run.tokenizer) == run.model.vocab_size + 1


class TestDevLimit:
    """Rows that are too long are no dev rows: the limit counts those that are left."""

    def test_of_a_dev_file(self, model, tmp_path):
        dev = rows_of(tmp_path / "dev.jsonl", ["long " * 200] * 4 + ["a", "b", "c"])
        run, said = prepared(config_of(model, tmp_path, dev=dev, dev_limit=2))
        texts = [run.tokenizer.decode(row[0].tokens[row[0].prompt_length : -1]) for row in run.dev]
        assert texts == ["a", "b"]
        assert any("2 dev (0 dropped)" in line for line in said)

    def test_of_rows_that_are_held_out(self, model, tmp_path):
        train = rows_of(tmp_path / "mixed.jsonl", ["long " * 200, "x"] * 10)
        run, _ = prepared(config_of(model, tmp_path, train=train, dev_share=0.5, dev_limit=3))
        assert (len(run.train), len(run.dev)) == (7, 3)

    def test_dev_rows_that_are_all_too_long_are_called_so(self, model, tmp_path):
        dev = rows_of(tmp_path / "dev.jsonl", ["long " * 200] * 4)
        for limit in (0, 2):
            with pytest.raises(UserError, match=r"all \d dev rows are longer than data\.max_length 400"):
                prepared(config_of(model, tmp_path, dev=dev, dev_limit=limit))
