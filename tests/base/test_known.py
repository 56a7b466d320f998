"""The shapes of published models have as many parameters as their cards say; every config file is a run."""

import importlib

import pytest

from milora_jax.base.known import SHAPES
from milora_jax.config import Config
from tests.paths import ROOT

PUBLISHED = {
    "llama2-7b": 6.738,
    "llama2-13b": 13.016,
    "llama2-70b": 68.977,
    "llama3-8b": 8.030,
    "llama3.1-8b": 8.030,
    "llama3.2-1b": 1.236,
    "mistral-7b": 7.242,
    "gemma-2b": 2.506,
    "gemma2-2b": 2.614,
    "gemma3-1b": 1.000,
    "qwen2.5-0.5b": 0.494,
    "qwen3-0.6b": 0.596,
    "mixtral-8x7b": 46.703,
    "qwen3-30b-a3b": 30.532,
    "olmoe-1b-7b": 6.919,
}
"""Billions of parameters, as the models' cards on the Hub give them."""

ACTIVE = {"mixtral-8x7b": 12.88, "qwen3-30b-a3b": 3.35, "olmoe-1b-7b": 1.28}
"""Billions of parameters that a token is multiplied by or looks up, of bases with experts."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name):
    model = SHAPES[name]
    count = model.total_parameters + (0 if model.tie_embeddings else model.vocab_size * model.hidden_size)
    assert abs(count / 1e9 / PUBLISHED[name] - 1) < 1e-3


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_uses_the_published_number_of_parameters(name):
    model = SHAPES[name]
    count = model.matrix_parameters + model.vocab_size * model.hidden_size
    assert abs(count / 1e9 / ACTIVE[name] - 1) < 5e-3


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_math.py")), ids=lambda path: path.stem)
def test_a_config_file_is_a_run(path):
    pytest.importorskip("ml_collections", reason="config files need it, the core does without")
    module = importlib.import_module(f"configs.{path.stem}")
    config = Config.from_dict(module.get_config().to_dict())
    assert config.data.train == "gsm8k=hf:openai/gsm8k:main:train"
    assert f"configs/{path.name}" in module.__doc__
