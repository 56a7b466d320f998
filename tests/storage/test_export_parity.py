"""What is exported gives our numbers in the programs it is for: PEFT, and transformers under torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.transformer import forward, unembed
from milora_jax.data.tokens import encode_prompt, load_tokenizer
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.storage.export import export_milora, export_peft
from milora_jax.storage.torch_reference import attach
from tests.models import TINY, write_hf_directory
from tests.storage.adapters import run_of

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

MODELS = {"plain": TINY, "biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True)}
PROMPTS = ["Below is a word.", "Write a response that", "an instruction", "task"]
METHODS = {
    "lora": {"alpha": 8.0},
    "dora": {"alpha": 2.0},
    "adalora": {"alpha": 6.0},
    "ssp": {},
    "ia3": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        write_hf_directory(folder, MODELS[name], tokenizer=False)
    return folders


def torch_model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def our_logits(folder, adapter, tokens, **more):
    base, config = load_base(folder)
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)

    def compute(base, adapter):
        output = forward(base, config, tokens, positions, jnp.ones_like(tokens), adapter=adapter, **more)
        return unembed(base, output.hidden), output.route

    logits, route = jax.jit(compute)(base, adapter)
    return np.asarray(logits), route


def tokens_of(config, rows=2, length=24):
    return np.random.default_rng(5).integers(4, config.vocab_size, (rows, length)).astype(np.int32)


def assert_near(found, expected, tolerance=1e-5):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance, error


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_an_export_and_gives_our_logits(method, name, models, tmp_path):
    from peft import PeftModel

    folder, tokens = models[name], tokens_of(MODELS[name])
    adapter = run_of(tmp_path / "run", folder, method, **METHODS[method])
    export_peft(tmp_path / "run", tmp_path / "out", str(folder))
    plain = torch_model(folder)
    before = their_logits(plain, tokens)
    model = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    found = their_logits(model, tokens)
    assert_near(found, our_logits(folder, adapter, tokens)[0])
    with pytest.raises(AssertionError):
        assert_near(found, before, 1e-2)


ROUTED = [
    ("milora", {}),
    ("milora", {"pooler": "mean", "activation": "gelu-relu", "gate": "softmax", "alpha": 6.0, "top_k": 2}),
    ("milora", {"pooler": "max", "activation": "relu", "gate": "renormalized", "top_k": 4}),
    ("milora", {"pooler": "last", "activation": "relu-gelu", "normalize": False, "gate": "softmax"}),
    ("milora", {"activation": "gelu", "top_k": 7}),
    ("midora", {"alpha": 2.0, "gate": "renormalized"}),
    ("midora", {"coefficients": "joint"}),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("method", "settings"), ROUTED)
def test_torch_computes_the_route_and_the_logits_from_the_exported_files(
    method, settings, name, models, tmp_path
):
    folder, tokens = models[name], tokens_of(MODELS[name])
    adapter = run_of(tmp_path / "run", folder, method, **settings)
    export_milora(tmp_path / "run", tmp_path / "out")
    model = torch_model(folder)
    before = their_logits(model, tokens)
    reader = attach(model, tmp_path / "out")
    found = their_logits(model, tokens)
    ours, route = our_logits(folder, adapter, tokens, prompt_mask=jnp.ones(tokens.shape, bool))
    for layer, weights in reader.weights.items():
        np.testing.assert_allclose(weights.numpy(), np.asarray(route.weights[layer, :, 0]), atol=1e-5)
    assert_near(found, ours)
    with pytest.raises(AssertionError):
        assert_near(found, before, 1e-2)
    reader.detach()
    np.testing.assert_array_equal(their_logits(model, tokens), before)


@pytest.mark.parametrize(("method", "settings"), [("milora", {}), ("midora", {"gate": "softmax"})])
def test_torch_generates_our_tokens_from_the_exported_files(method, settings, tmp_path):
    import torch

    folder = tmp_path / "model"
    write_hf_directory(folder)
    adapter = run_of(tmp_path / "run", folder, method, **settings)
    export_milora(tmp_path / "run", tmp_path / "out")
    base, config = load_base(folder)
    tokenizer = load_tokenizer(str(folder))
    wanted = GenerationSettings(max_new_tokens=40, ignore_eos=True)
    answers = generate(base, config, tokenizer, PROMPTS, adapter=adapter, settings=wanted)
    model = torch_model(folder)
    reader = attach(model, tmp_path / "out")
    assert len({answer.route.tobytes() for answer in answers}) > 1, "one route says little"
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        with torch.no_grad():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=None,
            )
        assert whole[0, ids.shape[1] :].tolist() == list(answer.tokens)
        route = torch.stack([reader.weights[layer][0] for layer in range(config.num_layers)])
        np.testing.assert_allclose(route.numpy(), answer.route, atol=1e-5)
