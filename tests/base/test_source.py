"""A model by its name on the Hub is the directory that the Hub library fetches; anything else is one line."""

import pytest

from milora_jax import load_base
from milora_jax.base import source
from milora_jax.base.source import model_directory
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from tests.models import WITH_TOKENIZER, write_hf_directory

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the core does without the Hub")
errors = pytest.importorskip("huggingface_hub.errors")
ERRORS = {
    "offline": errors.LocalEntryNotFoundError("no connection\nmore"),
    "no such name": ValueError(""),
    "no room": OSError("disk"),
}


@pytest.fixture(autouse=True)
def nothing_fetched_yet():
    source._fetched.cache_clear()


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the Hub was asked for; it gives a small model."""
    write_hf_directory(tmp_path)
    calls = []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision))
        assert not [pattern for pattern in allow_patterns if "bin" in pattern or "py" in pattern]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_name_on_the_hub_is_fetched(asked, tmp_path):
    assert model_directory("hf://meta-llama/Llama-3.2-1B@abc") == tmp_path
    _, config = load_base("hf://meta-llama/Llama-3.2-1B")
    assert config == WITH_TOKENIZER
    assert asked == [("meta-llama/Llama-3.2-1B", "abc"), ("meta-llama/Llama-3.2-1B", None)]
    pytest.importorskip("transformers")
    for _ in range(2):
        assert load_tokenizer(str(model_directory("hf://a/b"))).bos_token_id == 1
    assert asked[2:] == [("a/b", None)], "a second look asks the Hub no more"


def test_a_directory_is_itself(asked, tmp_path):
    assert model_directory(tmp_path) == tmp_path
    assert model_directory("models/llama").as_posix() == "models/llama"
    assert asked == []


@pytest.mark.parametrize(
    "name", ["hf://", "hf://llama", "hf://a/b/c", "hf:/a/b", "hf:a/b", "hf:///b", "hf://a/"]
)
def test_what_is_no_name_is_refused(name, asked):
    with pytest.raises(UserError, match="expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        model_directory(name)
    assert asked == []


@pytest.mark.parametrize("error", ERRORS)
def test_what_the_hub_does_not_give_is_one_line(error, monkeypatch):
    def refuse(*given, **more):
        raise ERRORS[error]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"model 'hf://a/b' cannot be fetched: \w+") as caught:
        model_directory("hf://a/b")
    assert "\n" not in str(caught.value)


def test_without_a_connection_the_real_library_ends_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="model 'hf://a/b' cannot be fetched: "):
        model_directory("hf://a/b")
