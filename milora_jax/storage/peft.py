"""Directories of Hugging Face PEFT: ``adapter_config.json`` beside ``adapter_model.safetensors``.

LoRA, methods that are decoded as LoRA (AdaLoRA, SSP), DoRA and (IA)3 are written, with one rank and one
alpha, because vLLM reads no more. Only LoRA and DoRA are read, and so strictly that nothing in a directory
is ignored: what cannot be mapped is refused by name (``storage.peft_settings``), and so is every missing or
extra tensor. Pairs of other ranks than the largest are padded with zeros, and the ratio of a module's scale
to the largest one is multiplied into its B.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from milora_jax.adapters.inputs import Shape
from milora_jax.adapters.protocol import Adapter
from milora_jax.adapters.records import Decomposed, LowRank, Record, Rescaled
from milora_jax.adapters.registry import METHOD_CLASSES
from milora_jax.base.families import FAMILIES
from milora_jax.base.specs import MODULE_PATHS
from milora_jax.errors import UserError
from milora_jax.model_config import ModelConfig
from milora_jax.storage.adapter_tensors import read_tensors, write_tensors
from milora_jax.storage.pair_tensors import (
    MATRICES,
    Shapes,
    pair_name,
    pair_tensors,
    require_change,
    require_same,
)
from milora_jax.storage.peft_settings import (
    PEFT_CONFIG,
    PEFT_TENSORS,
    PREFIX,
    Plan,
    peft_names,
    read_peft_settings,
    suffix,
)
from milora_jax.types import EXPERTS

IA3_LEAF = "ia3_l"

PEFT_DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of the tensors that are read."""

LEAVES = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude", IA3_LEAF: IA3_LEAF}
"""Our name of each leaf of PEFT."""

RECORDS: dict[str, type[Record]] = {"lora": LowRank, "dora": Decomposed}
"""The record of a module's parameters by the kind of an adapter."""

_NAME = re.compile(
    r"base_model\.model\.(?P<prefix>(?:(?:model|language_model|text_model)\.)+)layers\.(?P<layer>[0-9]{1,4})\."
    rf"(?P<path>{'|'.join(map(re.escape, MODULE_PATHS.values()))})\."
    r"(?:(?P<matrix>lora_[AB])(?:\.(?P<adapter>[^.]{1,64}))?\.weight|"
    r"(?P<vector>lora_magnitude_vector|ia3_l)(?:\.(?P<owner>(?!weight$)[^.]{1,64}))?(?:\.weight)?)"
)
"""The name of a tensor: plain, of a language model within a model that sees or hears, or with the name that
the adapter had in memory."""

_OUTSIDE = re.compile(r".*?\b(lm_head|embed_tokens|modules_to_save|lora_embedding_[AB]|base_layer)\b.*")


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
    """Refuse a base whose files store several of the seven modules in one tensor, and one with experts, which
    share pairs.

    Raises:
      UserError: the base is such; PEFT and readers of its files have no separate modules there.
    """
    if FAMILIES[model.family].fused:
        raise UserError(
            f"{base} is a {model.family!r}, whose files keep Q, K, V and gate, up together: PEFT has no such "
            "modules apart; expected another family, or format milora, orbax or merged"
        )
    if model.num_experts:
        raise UserError(
            f"{base} has {model.num_experts} experts in a layer, which share the pairs of gate, up and down: "
            "PEFT has no such pairs; expected a base without experts, or format milora, orbax or merged"
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
        targets = [suffix(name) for name in change.records]
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
        "target_modules": [suffix(name) for name in EXPERTS if name in change.records],
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


class PeftTensors(NamedTuple):
    """The tensors of a file under the names that :func:`write_peft` gives them.

    Attributes:
      tensors: by name; unknown names are as they are in the file.
      prefix: what stood before ``layers.0`` in the names of the model that it was trained on.
    """

    tensors: dict[str, np.ndarray]
    prefix: str


@dataclass(frozen=True)
class PeftPairs:
    """The pairs of an adapter, ready for one rank and one scale.

    Attributes:
      kind: lora or dora.
      rank: the largest rank R of a pair.
      alpha: numerator of the scale.
      use_rslora: whether alpha is divided by the root of the rank, not by the rank.
      dropout: dropout of its training.
      pairs: of the modules with a pair in some layer, stacked, of rank R; zero in layers without one.
      present: whether a module has a pair, by layer.
      said: one line per thing worth knowing.
    """

    kind: str
    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    pairs: dict[str, Record]
    present: dict[str, np.ndarray]
    said: tuple[str, ...]


def read_peft(directory: Path, shape: Shape) -> PeftPairs:
    """Read a LoRA or DoRA that PEFT saved for a base of this shape.

    Float16 and bfloat16 tensors become float32.

    Raises:
      UserError: a setting or a tensor is missing, unknown or unfit, and is named in the error; or the weights
        are a pickle; or the pairs change nothing.
    """
    settings, path = read_peft_settings(directory), directory / PEFT_TENSORS
    if settings.kind == "ia3":
        raise UserError(f"{directory / PEFT_CONFIG}: peft_type is 'IA3', expected 'LORA'")
    tensors, prefix = read_peft_tensors(path)
    plan = settings.plan(shape.num_layers, prefix)
    for name in tensors:
        outside = _OUTSIDE.fullmatch(name)
        if outside:
            raise UserError(f"{path}: unexpected tensor {name!r}: weights of {outside[1]} are not supported")
    require_same(tensors, peft_shapes(shape, settings.kind, plan), str(path), PEFT_DTYPES)
    require_change(tensors, str(path))
    rank = max(target.rank for target in plan.values())
    alphas = {place: settings.alpha_at(rank, target) for place, target in plan.items()}
    alpha = max(alphas.values())
    record = RECORDS[settings.kind]
    modules = [module for module in EXPERTS if any(module == mine for _, mine in plan)]
    layers = range(shape.num_layers)
    divisor = math.sqrt(rank) if settings.use_rslora else rank
    said = list(_notes(plan, {alpha / divisor for alpha in alphas.values()}, rank, prefix))
    others = peft_names(directory)
    if others:
        said.append(f"the adapters in its folders are not read: {', '.join(others[:8])}")
    return PeftPairs(
        kind=settings.kind,
        rank=rank,
        alpha=alpha,
        use_rslora=settings.use_rslora,
        dropout=settings.dropout,
        pairs={module: _stacked(tensors, shape, record, module, rank, alphas, alpha) for module in modules},
        present={module: np.array([(layer, module) in plan for layer in layers]) for module in modules},
        said=tuple(said),
    )


def read_peft_tensors(path: Path) -> PeftTensors:
    """Read the tensors of a file, under plain names.

    Raises:
      UserError: the file is damaged, or holds tensors of several models or adapters.
    """
    tensors: dict[str, np.ndarray] = {}
    origin: tuple[str, str | None, str] | None = None
    for name, value in read_tensors(path).items():
        found = _NAME.fullmatch(name)
        plain = name
        if found:
            mine = found["prefix"], found["adapter"] or found["owner"], name
            origin = origin or mine
            if mine[:2] != origin[:2]:
                raise UserError(
                    f"{path}: tensors {origin[2]!r} and {name!r} are those of two models or adapters"
                )
            module = next(module for module, place in MODULE_PATHS.items() if place == found["path"])
            plain = pair_name(int(found["layer"]), module, LEAVES[found["matrix"] or found["vector"]])
        if plain in tensors:
            raise UserError(f"{path}: tensor {name!r} is there under two names")
        tensors[plain] = value
    return PeftTensors(tensors, origin[0] if origin else PREFIX)


def peft_shapes(shape: Shape, kind: str, plan: Plan) -> Shapes:
    """Names and shapes of the tensors of a plan, for a base of a shape."""
    expected: Shapes = {}
    for (layer, module), (rank, _) in plan.items():
        d_in, d_out = shape.dims[module]
        if kind == "ia3":
            expected[pair_name(layer, module, IA3_LEAF)] = (d_out, 1)
            continue
        shapes = {"a": (rank, d_in), "b": (d_out, rank), "magnitude": (d_out,)}
        for field in dataclasses.fields(RECORDS[kind]):
            expected[pair_name(layer, module, field.name)] = shapes[field.name]
    return expected


def _stacked(
    tensors: Mapping[str, np.ndarray],
    shape: Shape,
    record: type[Record],
    module: str,
    rank: int,
    alphas: Mapping[tuple[int, str], float],
    alpha: float,
) -> Record:
    """One module's pairs, stacked and padded; B has the ratio of the pair's scale to the adapter's."""
    d_in, d_out = shape.dims[module]
    sizes = {"a": (d_in, rank), "b": (rank, d_out), "magnitude": (d_out,)}
    leaves = {
        field.name: np.zeros((shape.num_layers, *sizes[field.name]), np.float32)
        for field in dataclasses.fields(record)
    }
    for layer in range(shape.num_layers):
        if (layer, module) not in alphas:
            continue
        ratio = alphas[layer, module] / alpha
        for name, leaf in leaves.items():
            value = np.asarray(tensors[pair_name(layer, module, name)]).astype(np.float32)
            value = value.T if name in MATRICES else value
            if name == "b" and ratio != 1:
                value = value * np.float32(ratio)
            leaf[(layer, *map(slice, value.shape))] = value
    return record(**{name: jnp.asarray(leaf) for name, leaf in leaves.items()})


def _notes(plan: Plan, scales: Collection[float], rank: int, prefix: str) -> Iterator[str]:
    """One line per thing worth knowing about a mapping."""
    if prefix != PREFIX:
        yield f"trained within another model, as its {prefix.removesuffix('.')!r}: taken to be this base"
    least = min(target.rank for target in plan.values())
    if least < rank:
        yield f"pairs of rank {least} to {rank}: all are padded to {rank}, which changes nothing"
    if len(scales) > 1:
        yield f"scales from {min(scales):g} to {max(scales):g}: their ratios are multiplied into lora_B"
