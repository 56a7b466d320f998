"""Methods by name, and the conversion between a run's settings and its method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from milora_jax.adapters.adalora import AdaLoRA
from milora_jax.adapters.bitfit import BitFit
from milora_jax.adapters.dora import DoRA
from milora_jax.adapters.ia3 import IA3
from milora_jax.adapters.iapt import IAPT
from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.learned_adapter import LearnedAdapter
from milora_jax.adapters.lora import LoRA
from milora_jax.adapters.midora import MiDoRA
from milora_jax.adapters.milora import MiLoRA
from milora_jax.adapters.moelora import MOELoRA
from milora_jax.adapters.p_tuning_v2 import PTuningV2
from milora_jax.adapters.parallel_adapter import ParallelAdapter
from milora_jax.adapters.protocol import Method
from milora_jax.adapters.ssp import SSP
from milora_jax.config import AdapterSection, Config
from milora_jax.errors import UserError, one_of
from milora_jax.model_config import ModelConfig

METHOD_CLASSES: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        MiLoRA,
        MiDoRA,
        LoRA,
        DoRA,
        AdaLoRA,
        MOELoRA,
        IA3,
        BitFit,
        ParallelAdapter,
        LearnedAdapter,
        PTuningV2,
        IAPT,
        SSP,
    )
}
"""Every method by its name in ``adapter.method``; no other place lists them."""

METHODS = tuple(METHOD_CLASSES)


def build_method(settings: AdapterSection) -> Method:
    """Build the method of ``settings.method``; a setting that is None has the method's default.

    Raises:
      UserError: the method does not exist, or does not have a setting, or a setting is out of range.
    """
    one_of("adapter.method", settings.method, tuple(METHOD_CLASSES))
    cls = METHOD_CLASSES[settings.method]
    known = [field.name for field in dataclasses.fields(cls)]
    given = {name: value for name, value in vars(settings).items() if name != "method" and value is not None}
    for name in given:
        if name == "target_modules" and name not in known:
            has = [other for other in METHOD_CLASSES if name in _settings_of(other)]
            raise UserError(
                f"adapter.{name} is {given[name]!r}: expected none with method {settings.method!r}, "
                f"{cls.all_modules}; {' and '.join(has)} have it"
            )
        if name not in known:
            raise UserError(
                f"adapter.{name} is {given[name]!r}, but method {settings.method!r} has no such setting: "
                f"it has {', '.join(known)}"
            )
    return cls(**given)


def full_settings(method: Method) -> AdapterSection:
    """Every setting of ``method`` written out, as runs are stored.

    A default that changes in a later version must not change the meaning of an older file.
    """
    return AdapterSection(method=method.name, **dataclasses.asdict(method))


ROUTERS_BEFORE_FEATURES = {
    "feature_window": 0.0,
    "router_gradient": "chosen",
    "top_k_anneal": 0.0,
    "balance": "loss",
    "balance_warmup": 0.0,
    "balance_until": 1.0,
    "balance_decay": 0.0,
    "bias_rate": 1e-3,
}
"""The settings of a router that was stored before these settings existed."""


BEFORE_SETTINGS = {"route_on": "prompt", "use_rslora": False, "target_modules": "all-linear"}
"""What was stored before these were settings means."""


def before_features(values: Mapping[str, Any]) -> bool:
    """Whether stored settings are those of a router from before the setting ``features``."""
    return values.get("features") is None and values.get("normalize") is not None


def stored_settings(values: Mapping[str, Any]) -> AdapterSection:
    """Read the settings that any version stored with an adapter or a run.

    Args:
      values: settings by name, as ``dataclasses.asdict`` of :func:`full_settings` gives them.

    Raises:
      UserError: a setting is unknown or ill-typed.
    """
    settings = {**(ROUTERS_BEFORE_FEATURES if before_features(values) else {}), **values}
    known = _settings_of(settings.get("method"))
    for name, value in BEFORE_SETTINGS.items():
        if settings.get(name) is None and name in known:
            settings[name] = value
    return Config.from_dict({"adapter": settings}).adapter


def _settings_of(method: Any) -> set[str]:
    """Names of a method's settings; none of a method that there is not."""
    cls = METHOD_CLASSES.get(method) if isinstance(method, str) else None
    return set() if cls is None else {field.name for field in dataclasses.fields(cls)}


def require_fits(method: Method, model: ModelConfig) -> None:
    """Refuse a method that cannot change a base of this kind.

    Raises:
      UserError: the base has experts, and the method is not of those that they can share.
    """
    if model.num_experts and not method.additive:
        fitting = ", ".join(name for name, cls in METHOD_CLASSES.items() if cls.additive)
        raise UserError(
            f"adapter.method is {method.name!r}: expected one of {fitting}, "
            f"because the base has {model.num_experts} experts in a layer, which must share one adapter"
        )


def adapter_shape(model: ModelConfig) -> Shape:
    """The shape an adapter needs to fit a base."""
    return Shape.of(model.module_dims, model.num_layers, model.hidden_size)
