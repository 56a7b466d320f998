"""Directories of Hugging Face PEFT: ``adapter_config.json`` beside ``adapter_model.safetensors``.

LoRA, methods that are decoded as LoRA (AdaLoRA, SSP), DoRA and (IA)3 are written, with one rank and one
alpha, because vLLM reads no more. Only LoRA and DoRA are read, and so strictly that nothing in a directory is
ignored: a setting that changes the function in an unsupported way is refused by name, and so is every missing
or extra tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.low_rank import LARGEST_ALPHA, SMALLEST_ALPHA
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.records import Decomposed, LowRank, Record, Rescaled
from milora_jax.adapters.registry import METHOD_CLASSES
from milora_jax.base.families import FAMILIES
from milora_jax.base.json_files import parse_json_object
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapter_tensors import read_tensors, write_tensors
from milora_jax.storage.files import read_bytes
from milora_jax.storage.pair_tensors import (
    Shapes,
    pair_name,
    pair_shapes,
    pair_tensors,
    require_change,
    require_same,
    stacked_pairs,
)
from milora_jax.types import EXPERTS

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"

LARGEST_CONFIG = 2**20
"""Bytes of the largest ``adapter_config.json``; a regular one has about a thousand."""

LARGEST_RANK = 2**16

IA3_LEAF = "ia3_l"

PICKLES = (".bin", ".pt", ".pth")

PEFT_DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of the tensors that are read."""

OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_ia3_weights": (True, False),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Settings and values that leave ``W + s B A`` unchanged. Other ways to initialise change the base's own
weights."""

READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")

WITHOUT_EFFECT = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "corda_config",
    "runtime_config",
)
"""Settings about the origin of an adapter, or that act only together with a setting that is refused."""


@dataclass(frozen=True)
class PeftSettings:
    """The content of an ``adapter_config.json``.

    Attributes:
      kind: lora, dora or ia3.
      modules: the changed modules, in the order of ``types.EXPERTS``.
      rank: R of every pair; 0 without pairs.
      alpha: numerator of ``alpha / rank``.
      dropout: dropout of its training.
      use_rslora: whether alpha is divided by the root of the rank (arXiv 2312.03732), not by the rank.
    """

    kind: str
    modules: tuple[str, ...]
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def record(self) -> type[Record]:
        """The record of a module's parameters."""
        return Decomposed if self.kind == "dora" else LowRank

    def shapes(self, shape: Shape) -> Shapes:
        """Names and shapes of the file's tensors, for a base of a shape."""
        if self.kind == "ia3":
            return {
                pair_name(layer, module, IA3_LEAF): (shape.dims[module][1], 1)
                for module in self.modules
                for layer in range(shape.num_layers)
            }
        return pair_shapes(shape, self.rank, self.record, self.modules)


def write_peft(directory: Path, adapter: Adapter, base_name: str) -> None:
    """Write an adapter as PEFT saves it.

    Args:
      adapter: in the stacked layout.
      base_name: path or Hub name of the base, which PEFT's own loaders open.

    Raises:
      UserError: PEFT does not have the method.
    """
    tensors, settings = _peft_form(adapter)
    config = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        **settings,
    }
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    write_tensors(directory / PEFT_TENSORS, tensors)


def require_unfused(model: ModelConfig, base: Path) -> None:
    """Refuse a base whose files store several of the seven modules in one tensor.

    Raises:
      UserError: the base is such; PEFT and readers of its files have no separate modules there.
    """
    if FAMILIES[model.family].fused:
        raise UserError(
            f"{base} is a {model.family!r}, whose files keep Q, K, V and gate, up together: PEFT has no such "
            "modules apart; expected another family, or format milora, orbax or merged"
        )


def _peft_form(adapter: Adapter) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and settings of an adapter in PEFT's form."""
    method = adapter.method
    if method.record is None or method.routes:
        has = [name for name, cls in METHOD_CLASSES.items() if cls.record is not None and not cls.routes]
        raise UserError(
            f"method {method.name!r} has no PEFT form: expected one of {', '.join(has)} "
            "(of a milora, format 'static' writes one fixed route as a LoRA)"
        )
    change = method.weight_change(adapter.params)
    if method.record is Rescaled:
        tensors = {
            pair_name(layer, name, IA3_LEAF): factor[:, None]
            for name, record in change.records.items()
            for layer, factor in enumerate(np.asarray(record.factor, np.float32))
        }
        targets = [_suffix(name) for name in change.records]
        kind = {"peft_type": "IA3", "feedforward_modules": [], "init_ia3_weights": True}
        return tensors, {**kind, "target_modules": targets, "fan_in_fan_out": False, "modules_to_save": None}
    rank = change.rank
    alpha = change.scale * (math.sqrt(rank) if change.use_rslora else rank)
    tensors = pair_tensors(change.records)
    require_change(tensors, f"the adapter of method {method.name!r}")
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
        "lora_dropout": change.dropout,
        "target_modules": [_suffix(name) for name in EXPERTS if name in change.records],
        "use_dora": method.record is Decomposed,
        "use_rslora": change.use_rslora,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "modules_to_save": None,
    }


def read_peft(directory: Path, shape: Shape) -> tuple[PeftSettings, dict[str, Record]]:
    """Read a LoRA or DoRA that PEFT saved for a base of this shape.

    Float16 and bfloat16 tensors become float32.

    Returns:
      Its settings, and the pairs of its modules.

    Raises:
      UserError: a setting or a tensor is missing, unknown or unfit, and is named in the error; or the weights
        are a pickle; or the pairs change nothing.
    """
    settings, path = read_peft_settings(directory), directory / PEFT_TENSORS
    if settings.kind == "ia3":
        raise UserError(f"{directory / PEFT_CONFIG}: peft_type is 'IA3', expected 'LORA'")
    tensors = read_tensors(path)
    require_same(tensors, settings.shapes(shape), str(path), PEFT_DTYPES)
    pairs = stacked_pairs(tensors, shape, settings.record, settings.modules)
    require_change(tensors, str(path))
    return settings, pairs


def read_peft_settings(directory: Path) -> PeftSettings:
    """Read and check the ``adapter_config.json`` of a directory.

    Raises:
      UserError: a setting is missing, ill-typed or changes the function in an unsupported way, and is named
        in the error; or the weights are a pickle.
    """
    where = str(directory / PEFT_CONFIG)
    if not directory.is_dir():
        raise UserError(f"{str(directory)!r}: no such directory, expected a PEFT adapter")
    pickles = sorted(path.name for path in directory.glob("adapter_model.*") if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{directory}: found {pickles[0]}, but pickles are never loaded; expected {PEFT_TENSORS}"
        )
    values = parse_json_object(read_bytes(directory / PEFT_CONFIG, LARGEST_CONFIG), where)
    _refuse_other(values, where)
    modules = _modules(values.get("target_modules"), where)
    if values["peft_type"] == "IA3":
        return PeftSettings("ia3", modules)
    rank, alpha, dropout = (values.get(name, 0.0) for name in ("r", "lora_alpha", "lora_dropout"))
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise UserError(f"{where}: r is {rank!r}, expected a whole number from 1 to {LARGEST_RANK}")
    if type(alpha) not in (int, float) or not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
        expected = f"a number from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g} (0 changes nothing)"
        raise UserError(f"{where}: lora_alpha is {str(alpha)[:80]}, expected {expected}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{where}: lora_dropout is {dropout!r}, expected a number from 0 to below 1")
    kind, use_rslora = "dora" if values.get("use_dora") else "lora", bool(values.get("use_rslora"))
    return PeftSettings(kind, modules, rank, float(alpha), float(dropout), use_rslora)


def _refuse_other(values: dict[str, Any], where: str) -> None:
    """Refuse other kinds of adapters, and every setting that changes the function in an unsupported way."""
    kind = values.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UserError(f"{where}: peft_type is {kind!r}, expected 'LORA'")
    for name, value in sorted(values.items()):
        if name in ("use_rslora", "use_dora") and value not in (True, False, None):
            raise UserError(f"{where}: {name} is {value!r}, expected true or false")
        allowed = OFF.get(name, ())
        empty = value is None or value is False or value in ("", [], {})
        if not (empty or name in READ or name in WITHOUT_EFFECT or value in allowed):
            expected = " or ".join(map(repr, allowed)) or "unset: not supported"
            raise UserError(f"{where}: {name} is {value!r}, expected {expected}")


def _modules(targets: Any, where: str) -> tuple[str, ...]:
    """Our names of the modules in ``target_modules``."""
    if not isinstance(targets, list) or not targets or any(not isinstance(name, str) for name in targets):
        raise UserError(f"{where}: target_modules is {targets!r}, expected a list of module names")
    ours = {name: module for module, path in MODULE_PATHS.items() for name in (path, path.split(".")[-1])}
    for name in targets:
        if name not in ours:
            known = ", ".join(_suffix(module) for module in EXPERTS)
            raise UserError(f"{where}: target_modules names {name!r}, expected some of {known}")
    found = {ours[name] for name in targets}
    return tuple(module for module in EXPERTS if module in found)


def _suffix(module: str) -> str:
    return MODULE_PATHS[module].split(".")[-1]
