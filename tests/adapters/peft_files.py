"""What Hugging Face PEFT saves, read as our adapters."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from milora_jax.adapters.adalora import Triplets
from milora_jax.adapters.protocol import Adapter, Method
from milora_jax.adapters.records import Decomposed, LowRank
from milora_jax.adapters.registry import adapter_shape, build_method
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.config import AdapterSection
from milora_jax.model_config import ModelConfig

LEAVES = {
    "lora": (LowRank, {"a": "lora_A", "b": "lora_B"}),
    "dora": (Decomposed, {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}),
    "adalora": (Triplets, {"a": "lora_A", "b": "lora_B", "singular": "lora_E"}),
}
"""The record of a module's parameters, and PEFT's name of each of its leaves, by method."""


def read_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """The adapter that ``PeftModel.save_pretrained`` wrote into ``folder`` for a base like ``model``.

    An AdaLoRA must not have been pruned yet: PEFT leaves pruned triplets out of its files.
    """
    method = read_method(json.loads((folder / "adapter_config.json").read_text()))
    params = stacked(method, model, load_file(folder / "adapter_model.safetensors"))
    return Adapter(params=jax.tree.map(jnp.asarray, params), method=method, shape=adapter_shape(model))


def read_method(settings: dict) -> Method:
    """The method of PEFT's ``adapter_config.json``."""
    alpha = float(settings["lora_alpha"])
    if settings["peft_type"] == "LORA":
        name = "dora" if settings["use_dora"] else "lora"
        return build_method(AdapterSection(method=name, rank=settings["r"], alpha=alpha))
    assert settings["peft_type"] == "ADALORA", settings["peft_type"]
    steps = settings["total_step"]
    return build_method(
        AdapterSection(
            method="adalora",
            rank=settings["target_r"],
            initial_rank=settings["init_r"],
            # PEFT divides alpha by the rank plus 1e-5, we by the rank.
            alpha=alpha / (1 + 1e-5 / settings["init_r"]),
            orthogonality=settings["orth_reg_weight"],
            prune_start=settings["tinit"] / steps,
            prune_end=1 - settings["tfinal"] / steps,
            prune_every=settings["deltaT"],
            sensitivity_decay=settings["beta1"],
            spread_decay=settings["beta2"],
        )
    )


def stacked(method: Method, model: ModelConfig, tensors: dict[str, np.ndarray]) -> dict:
    """PEFT's tensors, or their gradients, in the form of our parameters; none may be missing or left over."""
    record, names = LEAVES[method.name]
    # In the model the names of tensors also hold the name of the adapter, and in LoRA's ".weight".
    given = {name.replace(".default", "").removesuffix(".weight"): value for name, value in tensors.items()}
    assert len(given) == len(tensors)

    def leaf(path: str, name: str) -> np.ndarray:
        every = [given.pop(tensor_name(layer, path, name)) for layer in range(model.num_layers)]
        # E is [r, 1] there and [r] here; matrices are [out, in] there; a magnitude is [out] in both.
        return np.stack([value[:, 0] if name == "lora_E" else value.T for value in every])

    params = {
        module: record(**{ours: leaf(path, theirs) for ours, theirs in names.items()})
        for module, path in MODULE_PATHS.items()
    }
    assert not given, sorted(given)
    return params


def tensor_name(layer: int, path: str, name: str) -> str:
    """How PEFT calls a tensor of a layer's module, without what :func:`stacked` removes."""
    return f"base_model.model.model.layers.{layer}.{path}.{name}"
