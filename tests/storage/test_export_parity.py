"""What is exported gives our numbers in the programs it is for: PEFT, and transformers under torch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.base.load import load_base
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.data.tokens import load_tokenizer
from milora_jax.errors import UserError
from milora_jax.generation.settings import GenerationSettings
from milora_jax.generation.text import generate
from milora_jax.prompt_format import PromptFormat
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.export import export_merged, export_milora, export_peft, export_static
from milora_jax.storage.imported import import_peft
from milora_jax.storage.torch_reference import attach
from milora_jax.storage.verify import findings
from milora_jax.types import EXPERTS
from tests.families import EXPERT_CONFIGS, FAMILY_CONFIGS
from tests.models import TINY, tame_base, write_hf_directory
from tests.storage.adapters import noisy_adapter, run_of, write_run
from tests.storage.torch_logits import assert_near, logits_of, their_logits, torch_model

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

UNFUSED = {
    name: config for name, config in FAMILY_CONFIGS.items() if name != "phi3" and name not in EXPERT_CONFIGS
}
MODELS = {"plain": TINY, "biases": dataclasses.replace(TINY, biased=EXPERTS), **UNFUSED}
LORA_OF_FAMILIES = [("lora", name) for name in UNFUSED]
PROMPTS = ["Below is a word.", "Write a response that", "an instruction", "task"]
METHODS = {
    "lora": {"alpha": 8.0},
    "dora": {"alpha": 2.0, "use_rslora": True},
    "adalora": {"alpha": 6.0, "use_rslora": True},
    "ssp": {},
    "ia3": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        write_hf_directory(folder, MODELS[name], tokenizer=False, base=tame_base(MODELS[name]))
    return folders


def our_logits(folder, adapter, tokens, **more):
    return logits_of(*load_base(folder), adapter, tokens, **more)


def tokens_of(config, rows=2, length=24):
    return np.random.default_rng(5).integers(4, config.vocab_size, (rows, length)).astype(np.int32)


@pytest.mark.parametrize(
    ("method", "name"),
    [*((method, name) for method in METHODS for name in ("plain", "biases")), *LORA_OF_FAMILIES],
)
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


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_an_export_of_some_modules(method, models, tmp_path):
    from peft import PeftModel

    folder, tokens = models["biases"], tokens_of(MODELS["biases"])
    chosen = {"target_modules": "q_proj,up_proj,down_proj", "alpha": 6.0}
    adapter = run_of(tmp_path / "run", folder, method, **chosen)
    export_peft(tmp_path / "run", tmp_path / "out", str(folder))
    model = PeftModel.from_pretrained(torch_model(folder), tmp_path / "out").eval()
    assert_near(their_logits(model, tokens), our_logits(folder, adapter, tokens)[0])


def fixed_route(layers):
    """Three experts a layer, each with a weight of its own."""
    rng = np.random.default_rng(2)
    weights = np.zeros((layers, 7), np.float32)
    for row in weights:
        row[rng.choice(7, 3, replace=False)] = rng.uniform(0.5, 2.0, 3)
    return weights


@pytest.mark.parametrize("name", MODELS)
def test_a_static_route_gives_our_logits_in_peft_and_merged_in_transformers(name, models, tmp_path):
    from peft import PeftModel

    folder, config, tokens = models[name], MODELS[name], tokens_of(MODELS[name])
    adapter = run_of(tmp_path / "run", folder, "milora", alpha=6.0)
    weights = fixed_route(config.num_layers)
    export_static(tmp_path / "run", tmp_path / "static", str(folder), weights, {})
    export_merged(tmp_path / "run", folder, tmp_path / "merged", weights, {}, 20_000)
    shares = np.broadcast_to(weights[:, None, None], (config.num_layers, len(tokens), 1, 7))
    expected, _ = our_logits(folder, adapter, tokens, route=jnp.asarray(shares))
    plain = torch_model(folder)
    with pytest.raises(AssertionError):
        assert_near(their_logits(plain, tokens), expected, 1e-2)
    model = PeftModel.from_pretrained(plain, tmp_path / "static").eval()
    assert_near(their_logits(model, tokens), expected)
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    assert_near(their_logits(torch_model(tmp_path / "merged"), tokens), expected)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_what_peft_saves_is_imported_and_gives_its_logits(settings, models, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    folder, tokens = models["biases"], tokens_of(MODELS["biases"])
    modules = [path.split(".")[-1] for path in MODULE_PATHS.values()]
    if not settings:
        modules = modules[:4]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=modules, **settings)
    model = get_peft_model(torch_model(folder), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if "lora_A" in tensor_name or "lora_B" in tensor_name:
                tensor.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    (tmp_path / "theirs" / "README.md").unlink(missing_ok=True)
    assert findings(tmp_path / "theirs", folder) == {tmp_path / "theirs": []}
    import_peft(tmp_path / "theirs", folder, tmp_path / "ours")
    found, _ = our_logits(folder, load_adapter(tmp_path / "ours"), tokens)
    assert_near(found, their_logits(model, tokens))


ROUTED = [
    ("milora", {}),
    ("milora", {"pooler": "mean", "activation": "gelu-relu", "gate": "softmax", "alpha": 6.0, "top_k": 2}),
    ("milora", {"pooler": "max", "activation": "relu", "gate": "renormalized", "top_k": 4}),
    ("milora", {"pooler": "last", "activation": "relu-gelu", "features": "raw", "gate": "softmax"}),
    ("milora", {"features": "standardized"}),
    ("milora", {"features": "standardized", "pooler": "last", "activation": "gelu", "balance": "bias"}),
    ("milora", {"features": "rms", "pooler": "max", "balance": "bias", "gate": "renormalized"}),
    ("milora", {"activation": "gelu", "top_k": 7}),
    ("midora", {"alpha": 2.0, "gate": "renormalized", "use_rslora": True}),
    ("midora", {"coefficients": "joint", "features": "standardized", "pooler": "mean"}),
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
    ours, route = our_logits(folder, adapter, tokens)
    for layer, weights in reader.weights.items():
        np.testing.assert_allclose(weights.numpy(), np.asarray(route.weights[layer, :, 0]), atol=1e-5)
    assert_near(found, ours)
    with pytest.raises(AssertionError):
        assert_near(found, before, 1e-2)
    reader.detach()
    np.testing.assert_array_equal(their_logits(model, tokens), before)


@pytest.mark.parametrize("part", ["first_turn", "system"])
def test_torch_reads_the_part_of_a_prompt_that_routers_read(part, models, tmp_path):
    folder, tokens = models["plain"], tokens_of(TINY)
    chat = PromptFormat(template="chat")
    made = noisy_adapter(*load_base(folder), "milora", route_on=part, gate="softmax")
    write_run(tmp_path / "run", folder, dataclasses.replace(made, prompt_format=chat))
    export_milora(tmp_path / "run", tmp_path / "out")
    adapter, config = load_adapter(tmp_path / "out"), MODELS["plain"]
    assert adapter.method.route_on == part
    _, route = our_logits(folder, adapter, tokens[:, :7])
    model = torch_model(folder)
    reader = attach(model, tmp_path / "out")
    assert reader.prompt_format.route_on == part
    if part == "system":
        with pytest.raises(UserError, match="set route_tokens"):
            their_logits(model, tokens)
    reader.route_tokens = 7
    found = their_logits(model, tokens)
    for layer, weights in reader.weights.items():
        np.testing.assert_allclose(weights.numpy(), np.asarray(route.weights[layer, :, 0]), atol=1e-5)
    ours = logits_of(*load_base(folder), adapter, tokens, route=route.weights)[0]
    assert config.num_layers == len(reader.weights)
    assert_near(found, ours)


def test_torch_refuses_a_model_that_keeps_modules_together(tmp_path):
    write_hf_directory(tmp_path / "phi", FAMILY_CONFIGS["phi3"], tokenizer=False)
    run_of(tmp_path / "run", tmp_path / "phi", "milora")
    export_milora(tmp_path / "run", tmp_path / "out")
    with pytest.raises(
        UserError, match=r"no module 'self_attn.q_proj' in its layers: expected one for each expert"
    ):
        attach(torch_model(tmp_path / "phi"), tmp_path / "out")


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
        ids = torch.tensor([reader.encode(tokenizer, prompt)])
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
