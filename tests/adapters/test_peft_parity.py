"""LoRA, DoRA and AdaLoRA equal Hugging Face PEFT's, from the files that PEFT saves."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.protocol import init_adapter
from milora_jax.adapters.registry import adapter_shape
from milora_jax.base.load import load_base
from milora_jax.base.modules import frozen_kernels
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.base.transformer import forward, unembed
from milora_jax.training.loss import adapted_loss
from milora_jax.types import EXPERTS
from tests.adapted import row_batch, stack, text
from tests.adapters.peft_files import read_adapter, read_method, stacked
from tests.families import EXPERT_CONFIGS, FAMILY_CONFIGS
from tests.models import TINY, tame_base, write_hf_directory

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

TOLERANCE = 1e-5
"""Of an array's largest difference, as a share of the array's largest absolute value."""

FUSED = "phi3"
"""PEFT sees one module where there are three: its pairs are others."""

APART = [name for name in FAMILY_CONFIGS if name != FUSED and name not in EXPERT_CONFIGS]
"""Families in which PEFT's modules are ours. It has no pairs that experts share."""

MODELS = {
    "plain": TINY,
    "biases": dataclasses.replace(TINY, biased=EXPERTS),
    **{name: FAMILY_CONFIGS[name] for name in APART},
}
ADALORA = {
    "init_r": 6,
    "target_r": 3,
    "lora_alpha": 8,
    "total_step": 20,
    "tinit": 3,
    "tfinal": 6,
    "deltaT": 5,
    "beta1": 0.8,
    "beta2": 0.9,
}
SETTINGS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "adalora": {**ADALORA, "orth_reg_weight": 0.0},
    "adalora and its penalty": {**ADALORA, "orth_reg_weight": 0.5},
}
CASES = [
    *((name, model) for name in ("lora", "dora", "adalora") for model in ("plain", "biases")),
    *(("lora", name) for name in APART),
    ("adalora and its penalty", "plain"),
]
BATCH = stack(row_batch(text(0, 7), text(1, 9)), row_batch(text(2, 4), text(3, 12)))
FIRST_PRUNING, STEPS = 5, 20


def wrapped(folder, config, settings):
    """A random model in ``folder``, read by transformers and wrapped by PEFT on all seven modules."""
    import torch
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    write_hf_directory(folder, config, tokenizer=False, base=tame_base(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    kind = AdaLoraConfig if "init_r" in settings else LoraConfig
    return get_peft_model(model, kind(task_type="CAUSAL_LM", target_modules=modules, **settings)).eval()


def trained(model):
    """The named parameters that PEFT trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fill(model):
    """Random values of ordinary size, so that every tensor matters; magnitudes stay near their start."""
    import torch

    with torch.no_grad():
        for name, p in trained(model).items():
            if "lora_magnitude_vector" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape))
            else:
                p.normal_(0.0, 0.5 if "lora_E" in name else 0.1)


def theirs(model):
    """PEFT's logits, loss over the responses, and gradients of the loss by name."""
    import torch

    tokens = torch.from_numpy(np.array(BATCH.tokens, np.int64))
    labels = torch.where(torch.from_numpy(np.array(BATCH.loss_mask)), tokens, -100)
    model.zero_grad()
    output = model(input_ids=tokens, labels=labels)
    output.loss.backward()
    grads = {name: p.grad.numpy() for name, p in trained(model).items()}
    return output.logits.detach().numpy(), output.loss.item(), grads


def our_logits(adapter, base, config):
    return unembed(base, config, forward(base, config, BATCH, adapter=adapter).hidden)


def assert_near(found, expected, what):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, what
    size = np.abs(expected).max()
    assert size > 0, f"{what} says nothing"
    error = np.abs(found - expected).max() / size
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A method's random PEFT model, the same adapter read from PEFT's files, and the base."""
    name, model_name = request.param
    config, folder = MODELS[model_name], tmp_path_factory.mktemp("peft")
    model = wrapped(folder / "base", config, SETTINGS[name])
    fill(model)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    base, read = load_base(folder / "base")
    assert read == config
    adapter = read_adapter(folder / "adapter", config)
    return SimpleNamespace(model=model, adapter=adapter, base=base, config=config)


def test_logits_loss_and_every_gradient_equal_those_of_peft(case):
    logits, loss, grads = theirs(case.model)
    assert_near(jax.jit(our_logits, static_argnums=2)(case.adapter, case.base, case.config), logits, "logits")

    def our_loss(params):
        new = case.adapter.replace(params=params)
        return adapted_loss(new, case.base, case.config, BATCH, key=None)[0]

    found_loss, found = jax.jit(jax.value_and_grad(our_loss))(case.adapter.params)
    assert_near(found_loss, loss, "loss")
    expected = stacked(case.adapter.method, case.config, grads)
    jax.tree_util.tree_map_with_path(
        lambda path, ours, peft: assert_near(ours, peft, jax.tree_util.keystr(path)), found, expected
    )


def test_every_tensor_of_the_files_matters(case):
    """Without it the comparison of logits would not see a leaf that is read wrongly."""
    compute = jax.jit(our_logits, static_argnums=2)
    whole = compute(case.adapter, case.base, case.config)
    leaves, structure = jax.tree.flatten(case.adapter.params)
    for i, leaf in enumerate(leaves):
        changed = [*leaves[:i], leaf.at[-1].multiply(1.01), *leaves[i + 1 :]]
        other = compute(
            case.adapter.replace(params=jax.tree.unflatten(structure, changed)), case.base, case.config
        )
        with pytest.raises(AssertionError, match="logits"):
            assert_near(other, whole, "logits")


@pytest.mark.parametrize("model_name", MODELS)
def test_a_fresh_dora_has_the_magnitudes_of_peft(model_name, tmp_path):
    config = MODELS[model_name]
    model = wrapped(tmp_path / "base", config, SETTINGS["dora"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = read_adapter(tmp_path / "adapter", config)
    base, _ = load_base(tmp_path / "base")
    fresh = init_adapter(expected.method, jax.random.key(0), adapter_shape(config), frozen_kernels(base))
    for name in EXPERTS:
        assert_near(fresh.params[name].magnitude, expected.params[name].magnitude, name)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_orthogonality_penalty_is_that_of_peft(weight, tmp_path):
    model = wrapped(tmp_path / "base", TINY, SETTINGS["adalora"])
    fill(model)
    settings = model.peft_config["default"]
    _, plain, _ = theirs(model)
    settings.orth_reg_weight = weight
    _, whole, _ = theirs(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "adapter", TINY)
    assert_near(adapter.method.penalty(adapter.params), whole - plain, "penalty")


def allocator(matrices, **settings):
    """PEFT's allocator for that many modules; it looks at nothing but their ranks."""
    import torch
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    config = AdaLoraConfig(**settings)
    named = [(f"{i}.lora_A.default", torch.empty(config.init_r, 1)) for i in range(matrices)]
    return RankAllocator(SimpleNamespace(named_parameters=lambda: named), config, "default")


@pytest.mark.parametrize(
    ("steps", "start", "final", "every"), [(20, 3, 6, 4), (100, 0, 0, 1), (40, 4, 12, 7)]
)
@pytest.mark.parametrize(("initial", "target"), [(6, 3), (12, 8), (64, 32)])
def test_the_budget_of_every_step_is_that_of_peft(steps, start, final, every, initial, target):
    settings = {"init_r": initial, "target_r": target, "total_step": steps}
    settings |= {"tinit": start, "tfinal": final, "deltaT": every}
    # As many as 32 layers have: with fewer, a schedule in float32 is never off by one in these cases.
    matrices = len(EXPERTS) * 32
    peft = allocator(matrices, **settings)
    method = read_method(peft.peft_config.to_dict())
    first, last = matrices * initial, matrices * target
    found = list(method.budgets(first, last, steps)[1:])
    assert found == [peft.budget_schedule(step)[0] for step in range(1, steps + 1)]


def inject(model, updates, grads):
    """Do to PEFT's parameters what an optimiser would."""
    import torch

    with torch.no_grad():
        for name, p in trained(model).items():
            p.add_(torch.from_numpy(updates[name]))
            p.grad = torch.from_numpy(grads[name])


@pytest.fixture(scope="module", params=[0, 1, 2])
def pruning(request, tmp_path_factory):
    """A whole training's allocation by PEFT and by us, from the same parameters, updates and gradients.

    Gives the parameters, and the triplets in force, after every step.
    """
    folder = tmp_path_factory.mktemp("pruning")
    model = wrapped(folder / "base", TINY, SETTINGS["adalora"])
    fill(model)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    adapter = read_adapter(folder / "adapter", TINY)
    method, params = adapter.method, adapter.params
    memory = method.init_memory(params)
    after_update = jax.jit(method.after_update, static_argnums=4)
    rng, history = np.random.default_rng(request.param), []
    for step in range(1, STEPS + 1):
        drawn = [
            {name: scale * rng.normal(size=p.shape).astype(np.float32) for name, p in trained(model).items()}
            for scale in (0.02, 1.0)
        ]
        inject(model, *drawn)
        model.base_model.update_and_allocate(step)
        updates, grads = (jax.tree.map(jnp.asarray, stacked(method, TINY, values)) for values in drawn)
        params = jax.tree.map(jnp.add, params, updates)
        params, memory = after_update(params, grads, memory, jnp.asarray(step), STEPS)
        values = {name: p.detach().numpy().copy() for name, p in trained(model).items()}
        pattern = model.peft_config["default"].rank_pattern
        history.append((params, np.asarray(memory.kept), stacked(method, TINY, values), pattern))
    return history


def test_pruning_leaves_the_parameters_of_peft_after_every_step(pruning):
    for params, _, expected, _ in pruning:
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_pruning_keeps_the_triplets_of_pefts_rank_pattern(pruning):
    for step, (_, kept, _, pattern) in enumerate(pruning, 1):
        if step < FIRST_PRUNING:
            assert kept.all()
            assert pattern is None
        else:
            entry = "model.layers.{}.{}.lora_E.default"
            layers = range(TINY.num_layers)
            expected = [[pattern[entry.format(i, MODULE_PATHS[name])] for i in layers] for name in EXPERTS]
            np.testing.assert_array_equal(kept, expected, err_msg=f"step {step}")
    counts = [int(kept.sum()) for _, kept, _, _ in pruning]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == len(EXPERTS) * TINY.num_layers * ADALORA["target_r"]
