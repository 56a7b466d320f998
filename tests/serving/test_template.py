"""A model's chat template is tried before it is served."""

import json

import pytest

from milora_jax.errors import UserError
from milora_jax.serving import template
from milora_jax.serving.template import require_bounded_template
from tests.models import WITH_TOKENIZER, write_hf_directory
from tests.serving.harness import TEMPLATE

pytest.importorskip("transformers")

BOMBS = {
    "counts": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "grows": "{% set x = namespace(v='x') %}{% for i in range(50) %}{% set x.v = x.v ~ x.v %}{% endfor %}x",
    "writes": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "model"
    write_hf_directory(folder, WITH_TOKENIZER)
    return folder


def with_template(model, text):
    path = model / "tokenizer_config.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name != "chat_template"}
    path.write_text(json.dumps(values if text is None else {**values, "chat_template": text}))
    return model


@pytest.mark.thorough
@pytest.mark.parametrize("text", [None, TEMPLATE], ids=["none", "named"])
def test_an_ordinary_one_and_none_are_served(model, text):
    require_bounded_template(with_template(model, text))


@pytest.mark.thorough
@pytest.mark.parametrize("name", BOMBS)
def test_one_that_takes_too_much_is_refused(model, name, monkeypatch):
    monkeypatch.setattr(template, "CPU_SECONDS", 8)
    with pytest.raises(UserError, match="the chat template is not"):
        require_bounded_template(with_template(model, BOMBS[name]))
