"""From the settings of a run to the method they name."""

from __future__ import annotations

from milora_jax.adapters.lora import LoRA
from milora_jax.adapters.milora import MiLoRA
from milora_jax.adapters.protocol import Method, Shape
from milora_jax.adapters.router import Router
from milora_jax.config import AdapterSection, ModelConfig


def build_method(settings: AdapterSection) -> Method:
    """The method of ``settings.method`` with the settings it reads."""
    if settings.method == "lora":
        return LoRA(rank=settings.rank, scale=settings.scale, dropout=settings.dropout)
    if settings.method == "milora":
        router = Router(
            top_k=settings.top_k,
            pooler=settings.pooler,
            activation=settings.activation,
            normalize=settings.normalize,
            gate=settings.gate,
        )
        return MiLoRA(rank=settings.rank, scale=settings.scale, dropout=settings.dropout, router=router)
    raise ValueError(f"unknown method {settings.method!r}")


def adapter_shape(model: ModelConfig) -> Shape:
    """The shape an adapter needs to fit a base."""
    return Shape.of(model.module_dims, model.num_layers, model.hidden_size)
